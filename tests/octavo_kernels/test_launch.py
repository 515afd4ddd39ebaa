"""Launches: listed instead of run, told apart by what is compiled, compiled without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from octavo_kernels import compiling, device
from octavo_kernels.launch import Launch, collecting, launch, recording
from octavo_kernels.testing import gpu_device

HERE = Path(__file__).parent


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scale_rows = _load("scale_rows_kernel").scale_rows


def scaled(x: torch.Tensor, factor: float, **options: Any) -> torch.Tensor:
    out = torch.empty_like(x)
    num_rows, dim = x.shape
    block = 1 << (dim - 1).bit_length()
    options = {"D": dim, "BLOCK": block, "num_warps": 1, **options}
    launch(scale_rows, (num_rows,), x, out, num_rows, factor, **options)
    return out


def collected(x: torch.Tensor, factor: float = 2.0, **options: Any) -> Launch:
    with collecting() as found:
        scaled(x, factor, **options)
    return found[0]


def test_a_launch_runs_the_kernel() -> None:
    x = torch.randn(5, 37, device=gpu_device())
    assert torch.equal(scaled(x, 3.0), x * 3.0)
    assert scaled(x[:0], 3.0).shape == (0, 37)


def test_collecting_lists_and_does_not_run() -> None:
    x = torch.ones(4, 8)
    out = torch.zeros(4, 8)
    with collecting() as outer:
        with collecting() as inner:
            launch(scale_rows, (4,), x, out, 4, 2.0, D=8, BLOCK=8)
        assert len(inner) == 1 and outer == []
        launch(scale_rows, (0,), x, out, 0, 2.0, D=8, BLOCK=8)
        assert outer == [], "an empty grid starts nothing"
    assert not out.any()
    assert inner[0].name == "scale_rows"
    assert inner[0].options == {"D": 8, "BLOCK": 8, "enable_fp_fusion": False}


def test_recording_lists_what_runs() -> None:
    x = torch.ones(4, 8, device=gpu_device())
    with recording() as keys:
        assert torch.equal(scaled(x, 2.0), 2 * x)
        scaled(x[:2], 3.0)
        scaled(x[:0], 3.0)
    assert keys == {collected(torch.empty(3, 8, device="meta")).key}
    with recording() as keys:
        scaled(x, 3.0, launch_pdl=True)
    assert keys == {collected(torch.empty(3, 8, device="meta"), launch_pdl=True).key}


def test_the_key_is_what_is_compiled() -> None:
    key = collected(torch.empty(3, 8, device="meta")).key
    assert collected(torch.empty(64, 8, device="meta"), 5.0).key == key, "rows and factors vary"
    other = [
        collected(torch.empty(3, 16, device="meta")),
        collected(torch.empty(3, 8, device="meta"), num_warps=2),
        collected(torch.empty(3, 8, device="meta", dtype=torch.float16)),
        collected(torch.empty(3, 8, device="meta"), enable_fp_fusion=True),
    ]
    assert len({key, *(launch.key for launch in other)}) == 5
    assert compiling.distinct([*other, *other]) == other


def test_early_launches_become_plain_where_the_gpu_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.empty(3, 8, device="meta")
    early = {"launch_pdl": True, "PDL": True}
    assert collected(x, **early).options.items() >= early.items()
    monkeypatch.setattr("octavo_kernels.launch.can_overlap", lambda: False)
    options = collected(x, **early).options
    assert options["PDL"] is False and "launch_pdl" not in options


@pytest.mark.parametrize(
    ("capability", "is_hopper", "can_overlap"),
    [((8, 0), False, False), ((9, 0), True, True), ((10, 0), False, True), (None, True, True)],
)
def test_a_gpu_is_what_its_capability_says(
    capability: tuple[int, int] | None,
    is_hopper: bool,
    can_overlap: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    functions: list[Any] = [device.capability, device.is_hopper, device.can_overlap]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for function in functions:
        function.cache_clear()
    try:
        assert (device.is_hopper(), device.can_overlap()) == (is_hopper, can_overlap)
    finally:
        for function in functions:
            function.cache_clear()


def test_interpreted_kernels_are_not_compiled() -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted here")
    with pytest.raises(RuntimeError, match="scale_rows is interpreted: unset TRITON_INTERPRET"):
        compiling.compile_all([collected(torch.empty(3, 8, device="meta"))], capability=90)


# Compiles for a GPU that need not be there, with Triton's interpreter off; the third launch, whose
# block is no power of two, is refused by the compiler.
SCRIPT = """
import json
import torch
from octavo_kernels.compiling import compile_all
from octavo_kernels.launch import collecting, compiling_for, launch, resources
from scale_rows_kernel import scale_rows

x = torch.empty(4, 1000, dtype=torch.bfloat16, device="meta")
with collecting() as found:
    for warps, block in ((1, 1024), (4, 1024), (1, 1000), (2, 1024), (8, 1024)):
        launch(scale_rows, (4,), x, x, 4, 2.0, D=1000, BLOCK=block, num_warps=warps)
failed = compile_all(found, capability=90, processes=1)
with compiling_for(90):
    compiled = found[1].compile()
used = resources(compiled)
ptx = compiled.asm["ptx"]
print(json.dumps({
    "failed": failed, "warps": used.warps, "stack": used.stack,
    "registers": used.registers, "sm_90": ".target sm_90" in ptx, "wide": "global.v4" in ptx,
}))
"""


def test_launches_are_compiled_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    roots = [str(Path(compiling.__file__).parents[1]), str(HERE)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={
            **environment,
            "PYTHONPATH": os.pathsep.join(roots),
            "TRITON_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert list(told["failed"]) == ["2"] and "power of 2" in told["failed"]["2"]
    assert told["warps"] == 4 and told["stack"] == 0 and 0 < told["registers"] < 100
    assert told["sm_90"] and told["wide"]
    assert len(list(tmp_path.glob("*/*.cubin"))) == 4


def test_who_compiles_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    parents = iter([7, 7, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(compiling, "_WATCH_SECONDS", 0)
    with pytest.raises(SystemExit):
        compiling._end_with_parent(7)
    assert not list(parents), "only when its parent is another"
