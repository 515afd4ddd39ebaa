"""Decode matmuls over weights of 8 and 4 bits beside bfloat16 ones, cold in L2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_recorder import Recorder, times_to_fill
from octavo_kernels import quant_matmul
from octavo_kernels.matmul import gpu as matmul
from octavo_kernels.quant_matmul import gpu

SHAPES = {"qkv": (6144, 4096), "gate-up": (28672, 4096), "down": (4096, 14336)}
Pack = Callable[[Tensor], quant_matmul.QuantWeight]
# name -> how weights are packed, whether activations are quantised too
FORMATS: dict[str, tuple[Pack, bool]] = {
    "fp8": (quant_matmul.pack_fp8, False),
    "fp8 x fp8": (quant_matmul.pack_fp8, True),
    "fp8 blocks x fp8": (quant_matmul.pack_fp8_blocks, True),
    "int8": (quant_matmul.pack_int8, False),
    "int8 x int8": (quant_matmul.pack_int8, True),
    "int4 128": (partial(quant_matmul.pack_int4, group=128), False),
}
SHORT = ("fp8", "int8", "int4 128")


def run_quant(recorder: Recorder, *, is_short: bool) -> None:
    seconds = 0.1 if is_short else 0.2
    for name, (n, k) in SHAPES.items():
        weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda") / k**0.5
        wide = [weight.clone() for _ in range(times_to_fill(weight.nbytes))]
        for form in SHORT if is_short else FORMATS:
            pack, is_eight_by_eight = FORMATS[form]
            packed = pack(weight)
            sets = [packed, *(pack(weight) for _ in range(times_to_fill(packed.num_bytes) - 1))]
            for rows in (1, 16):
                case = f"{name} {form} M={rows}"
                with recorder.case("quant_matmul", case):
                    x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
                    call = partial(gpu.quant_matmul, x, quantise_activations=is_eight_by_eight)
                    recorder.measure(
                        "quant_matmul",
                        case,
                        [partial(call, each) for each in sets],
                        baselines={"bf16": [partial(matmul.linear, x, each) for each in wide]},
                        bytes_moved=packed.num_bytes + 2 * rows * (n + k),
                        flops=2 * rows * n * k,
                        seconds=seconds,
                    )
            del sets
