"""GPU kernels of a model's shape: a closed set, listed without a GPU, compiled before they run."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

import octavo_kernels
from octavo_kernels import ModelShape, op_runs
from octavo_kernels.launch import collecting
from octavo_kernels.op_runs import Batch, Scene, decode, prefill

PACKAGE = Path(octavo_kernels.__file__).parent
LLAMA = ModelShape(hidden=4096, num_heads=32, num_kv_heads=8, head_dim=128, ffn=14336, vocab=128256)
TINY = ModelShape(
    hidden=128, num_heads=6, num_kv_heads=2, head_dim=64, ffn=256, vocab=500, has_qk_norm=True
)
ODD = ModelShape(
    hidden=192,
    num_heads=3,
    num_kv_heads=1,
    head_dim=96,
    ffn=320,
    vocab=1000,
    activation_dtype=torch.float16,
    cache_dtype=torch.float8_e4m3fn,
    block_size=64,
    gate="gelu_tanh_mul",
    norm="layer_norm",
    weight_format="int4_64",
    has_qkv_bias=True,
    has_encoder=True,
    sliding_window=100,
    soft_cap=30.0,
    has_sinks=True,
    num_drafts=3,
)


def random_batches(count: int, *, most: int) -> Iterator[Batch]:
    """Steps of many kinds and sizes, the smallest first; requests with a prefix among them."""
    source = random.Random(0)
    yield from (decode(1, 1), prefill(1), prefill(17), decode(3, 1025))
    for _ in range(count):
        requests = int(2 ** source.uniform(0, 9))
        kind = source.choice(["decode", "verify", "mixed"])
        new = {
            "decode": lambda: 1,
            "verify": lambda: source.randint(1, 9),
            "mixed": lambda: int(2 ** source.uniform(0, 9)),
        }[kind]
        query_lens = tuple(min(new(), most) for _ in range(requests))
        while sum(query_lens) > 6000:
            query_lens = query_lens[: len(query_lens) // 2]
        seq_lens = tuple(n + int(2 ** source.uniform(0, 14)) for n in query_lens)
        yield Batch(query_lens, seq_lens)


def test_every_gpu_op_is_called() -> None:
    ops = {path.parent.name for path in PACKAGE.glob("*/gpu.py")}
    assert set(op_runs.RUNS) == ops, "octavo_kernels/op_runs.py says how each op is called"


@pytest.mark.parametrize("shape", [LLAMA, TINY, ODD], ids=["llama", "tiny", "odd"])
def test_no_batch_needs_a_kernel_that_is_not_listed(shape: ModelShape) -> None:
    listed = {launch.key for launch in octavo_kernels.launches(shape)}
    assert 20 < len(listed) < 250
    for batch in random_batches(25, most=600):
        with collecting() as found:
            for run in op_runs.RUNS.values():
                run(Scene(shape, batch, "meta"))
        for launch in found:
            assert launch.key in listed, f"{launch.name} {launch.options} in {batch}"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"num_kv_heads": 5}, "num_heads must be a multiple of num_kv_heads"),
        ({"block_size": 8}, r"block_size must be one of \(16, 32, 64, 128\), got 8"),
        ({"cache_dtype": torch.int8}, "cache_dtype must be one of"),
        ({"rotary_dim": 66}, "rotary_dim must be even and at most 64, got 66"),
        ({"weight_format": "int3"}, "weight_format must be one of"),
    ],
)
def test_shapes_that_no_kernel_has_are_refused(wrong: dict[str, Any], message: str) -> None:
    sizes = {"hidden": 128, "num_heads": 6, "num_kv_heads": 2, "head_dim": 64, "ffn": 256}
    with pytest.raises(ValueError, match=message):
        ModelShape(**{**sizes, "vocab": 500, **wrong})


def test_warming_needs_the_gpu_that_it_is_for() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="no CUDA device"):
        octavo_kernels.warm(TINY)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [TINY, ODD], ids=["tiny", "odd"])
def test_nothing_is_compiled_after_warming(shape: ModelShape) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    octavo_kernels.warm(shape)
    compiled: list[str] = []

    def note(*, repr: str, **_: Any) -> None:
        compiled.append(repr)

    knobs = triton.knobs.runtime
    before = knobs.jit_post_compile_hook
    knobs.jit_post_compile_hook = note
    try:
        for batch in random_batches(25, most=600):
            for run in op_runs.RUNS.values():
                run(Scene(shape, batch, "cuda"))
        torch.cuda.synchronize()
    finally:
        knobs.jit_post_compile_hook = before
    assert compiled == []


def test_listing_imports_no_compiler_of_torch() -> None:
    """It does for some ops on "meta", which took a server's start seconds."""
    code = (
        "import sys\n"
        "from octavo_kernels import ModelShape, warming\n"
        "shape = ModelShape(\n"
        "    hidden=128, num_heads=6, num_kv_heads=2, head_dim=64, ffn=256, vocab=500,\n"
        "    has_qk_norm=True, has_qkv_bias=True,\n"
        ")\n"
        "assert len(warming.launches(shape)) > 100\n"
        "slow = ('torch._dynamo', 'torch._inductor', 'sympy')\n"
        "assert not [name for name in slow if name in sys.modules]\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
