"""What is worth measuring of the gated activations: how much of a row a program takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from octavo_kernels.launch import launch
from octavo_kernels.silu_mul.gpu import default_choice
from octavo_kernels.silu_mul.gpu_kernel import gate_mul_rows
from octavo_kernels.tuning import Choice, Tunable

_TOKENS = 4096


def _width(key: str) -> int:
    return int(key.removeprefix("F"))


def _candidates(key: str) -> Iterable[Choice]:
    first = default_choice(_width(key))
    yield first
    for block in (512, 1024, 2048, 4096):
        for num_warps in (1, 2, 4, 8):
            choice = {"block": block, "num_warps": num_warps}
            if 8 <= block // (32 * num_warps) <= 32 and choice != first:
                yield choice


def _make(key: str, choice: Choice) -> Callable[[], Any]:
    width = _width(key)
    x = torch.randn(_TOKENS, 2 * width, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(_TOKENS, width, device="cuda", dtype=torch.bfloat16)

    def run() -> torch.Tensor:
        launch(
            gate_mul_rows,
            (_TOKENS * -(-width // choice["block"]),),
            x,
            out,
            ACTIVATION="silu",
            F=width,
            BLOCK=choice["block"],
            PDL=False,
            num_warps=choice["num_warps"],
            launch_pdl=False,
        )
        return out

    return run


TUNABLES = (
    Tunable(
        op="silu_mul",
        keys=("F1536", "F3072", "F4096", "F8192", "F14336"),
        candidates=_candidates,
        make=_make,
        rotate=4,
    ),
)
