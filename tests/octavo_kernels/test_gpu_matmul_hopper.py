"""The Hopper matmul of few rows: compiled here, bit for bit the other tiles' on a Hopper."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo_kernels.matmul.gpu import by_tile, linear, make_tile
from octavo_kernels.matmul.gpu_hopper import hopper_shared_bytes, make_hopper_tile, runs_on_hopper
from octavo_kernels.matmul.gpu_spec import SHAPES_8B
from octavo_kernels.testing import assert_canaries, gpu_device, guarded_empty, same_bits

DEVICE = gpu_device()
PLAIN = make_tile(16, 32, 128, warps=4, stages=4)
# Rows of a wgmma all used or not, one part and two, short and long steps, one program and two.
TILES = (
    make_hopper_tile(8, 32, 128, stages=5),
    make_hopper_tile(16, 48, 64, stages=10),
    make_hopper_tile(16, 56, 256, stages=5),
    make_hopper_tile(32, 64, 128, stages=5, programs=2),
    make_hopper_tile(64, 8, 64, stages=3),
    make_hopper_tile(8, 64, 256, stages=3, parts=2),
    make_hopper_tile(16, 56, 128, stages=6, parts=2),
    make_hopper_tile(64, 40, 64, stages=4, parts=2, programs=2),
)
# K and N that the tiles do not divide; fewer steps than stages; one column
ODD = ((37, 72), (200, 4104), (1, 8), (1000, 1000))

COMPILE = """
import itertools, torch
from octavo_kernels.launch import collecting, compiling_for, resources
from octavo_kernels.matmul.gpu_hopper import by_hopper_tile, hopper_shared_bytes, make_hopper_tile

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

with collecting() as found:
    tile = make_hopper_tile(16, 32, 128, stages=5)
    by_hopper_tile(empty(9, 4096), empty(4096, 4096), tile, out=empty(9, 4096),
                   residual=empty(9, 4096), use_pdl=True)
    wide = make_hopper_tile(64, 56, 128, stages=4, parts=2)
    by_hopper_tile(empty(64, 4096), empty(28672, 4096), wide, out=empty(64, 14336),
                   bias=empty(28672), activation="silu")
    by_hopper_tile(empty(64, 4096), empty(6144, 4096), wide, out=empty(64, 6144),
                   bias=empty(6144), residual=empty(64, 6144))
    by_hopper_tile(empty(64, 4096), empty(6144, 4096), wide, out=empty(64, 3072),
                   activation="gelu_tanh")
    by_hopper_tile(empty(64, 4096), empty(6144, 4096), wide, out=empty(64, 6144))
for launch, tile in zip(found, (tile, wide, wide, wide, wide), strict=True):
    with compiling_for(90):
        compiled = launch.compile()
    taken = resources(compiled)
    assert taken.wgmma == 8 * tile["PARTS"] and taken.mma == 0, taken
    assert taken.stack == 0 and taken.registers <= 128, taken
    assert taken.shared <= hopper_shared_bytes(tile), taken
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    # one wait a step, none that ptxas has put behind every wgmma
    assert compiled.asm["sass"].count("WARPGROUP.DEPBAR") == 1, launch
assert "griddepcontrol" not in compiled.asm["ptx"]
"""


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype)


def test_compiles_for_hopper_within_its_registers() -> None:
    # a process of its own: in this one Triton's functions may be the interpreter's
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_candidate_fits_and_a_gate_takes_two_parts() -> None:
    from octavo_kernels.matmul.tunable import TUNABLES  # importing it sets cuBLAS's environment

    for tunable in TUNABLES[:2]:
        for key in tunable.keys:
            tiles = [tile for tile in tunable.candidates(key) if "HOPPER" in tile]
            assert bool(tiles) == (int(key.split("/")[2]) <= 64)
            for tile in tiles:
                assert tile["HOPPER"] * (hopper_shared_bytes(tile) + 1024) <= 228 * 1024
                assert tile["PARTS"] == 2 or tunable.op == "linear"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_the_kernel_cannot_take_gets_another_tile(dtype: torch.dtype) -> None:
    # rows of 70 elements, which TMA cannot copy; in the interpreter nothing is on a Hopper
    x, weight = _normal(3, 70, dtype=dtype), _normal(18, 70, dtype=dtype)
    assert not runs_on_hopper(x, weight)
    for activation in (None, "silu_mul"):
        want = linear(x, weight, activation=activation)
        got = by_tile(x, weight, TILES[6], activation=activation, out=torch.empty_like(want))
        assert same_bits(got, want)


def _skip_unless_hopper() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHAPES_8B)
def test_same_bits_as_the_other_tiles(name: str, dtype: torch.dtype) -> None:
    _skip_unless_hopper()
    n, k = SHAPES_8B[name]
    x, weight = _normal(64, k, dtype=dtype), _normal(n, k, dtype=dtype, seed=1)
    want = by_tile(x, weight, PLAIN, out=torch.empty(64, n, dtype=dtype, device=DEVICE))
    for tile in TILES:
        for num_rows in {1, 7, tile["BLOCK_M"], 64}:
            got = torch.full((num_rows, n), torch.nan, dtype=dtype, device=DEVICE)
            by_tile(x[:num_rows], weight, tile, out=got)
            assert same_bits(got, want[:num_rows]), f"{dict(tile)} T={num_rows}"


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [None, "silu_mul", "gelu_tanh_mul"])
@pytest.mark.parametrize(("n", "k"), ODD)
def test_odd_sizes_and_extras_stay_in_bounds(n: int, k: int, activation: Any) -> None:
    _skip_unless_hopper()
    rows = n * (2 if activation else 1)
    weight, bias = _normal(rows, k) / k**0.5, _normal(rows, seed=1)
    for num_rows in (1, 8, 33, 130):
        x, store = guarded_empty((num_rows, k), torch.bfloat16, DEVICE)
        x.copy_(_normal(num_rows, k, seed=2))
        residual = None if activation else _normal(num_rows, n, seed=3)
        extras = {"activation": activation, "bias": bias, "residual": residual}
        for dtype in (torch.bfloat16, torch.float32):
            if residual is not None:
                extras["residual"] = residual.to(dtype)
            blank = torch.empty(num_rows, n, dtype=dtype, device=DEVICE)
            want = by_tile(x, weight, PLAIN, **extras, out=blank)
            for tile in TILES:
                if activation and tile["PARTS"] == 1:
                    continue
                got, got_store = guarded_empty((num_rows, n), dtype, DEVICE)
                by_tile(x, weight, tile, **extras, out=got)
                assert same_bits(got, want), f"{dict(tile)} T={num_rows}"
                assert_canaries(got_store, f"{dict(tile)} T={num_rows}")
        assert_canaries(store, "x")


@pytest.mark.gpu
def test_a_chain_of_early_launches_has_the_same_bits() -> None:
    _skip_unless_hopper()
    x, first, second = _normal(16, 4096), _normal(4096, 4096, seed=1), _normal(4096, 4096, seed=2)
    first /= 64
    middle, out = torch.empty_like(x), torch.empty_like(x)
    by_tile(x, first, PLAIN, out=middle)
    want = by_tile(middle, second, PLAIN, out=torch.empty_like(x))
    graph = torch.cuda.CUDAGraph()
    for tile in (TILES[1], TILES[6], TILES[3]):
        by_tile(x, first, tile, out=middle, use_pdl=True)  # compiled before it is captured
        with torch.cuda.graph(graph):
            for _ in range(20):
                by_tile(x, first, tile, out=middle, use_pdl=True)
                by_tile(middle, second, tile, out=out, use_pdl=True)
        for _ in range(5):
            middle.fill_(torch.nan)
            graph.replay()
            assert same_bits(out, want), dict(tile)
        graph.reset()
