"""Launches Triton kernels, lists what would be launched, compiles without a device. Knows no op.

Three rules keep the set of compiled kernels closed and their bits apart from the compiler's taste:
sizes fixed by a model are constexpr, every other integer is never specialised (`jit`), and products
and sums are contracted only where a kernel says `fma` (`enable_fp_fusion` is off).
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo_kernels import interpreted  # noqa: F401  (mends the interpreter)
from octavo_kernels.device import can_overlap

_KIND_OF_INT = ("i32", "i64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One kernel as an op would start it: everything that decides what is compiled."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]  # constexprs and launch options by name

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two launches that share their machine code."""
        names = self.kernel.fn.__code__.co_varnames
        kinds = tuple(_kind(arg, name) for arg, name in zip(self.args, names, strict=False))
        options = tuple(sorted((k, repr(v)) for k, v in self.options.items()))
        return self.kernel.fn.__module__, self.name, kinds, options

    def compile(self) -> Any:
        """Compiles for the current device (or `compiling_for`), from the disk cache if it can."""
        return self.kernel.warmup(*self.args, grid=(1,), **self.options)


def _kind(arg: Any, name: str) -> str:
    if isinstance(arg, Tensor):
        # Triton compiles a second kernel for an address that is no multiple of 16, but see `jit`.
        is_anywhere = name.endswith("_ptr") and arg.data_ptr() % 16
        return f"*{arg.dtype}" + (" anywhere" if is_anywhere else "")
    if isinstance(arg, TensorDescriptor):
        return f"tile {arg.base.dtype} {list(arg.block_shape)}"
    if isinstance(arg, GluonDescriptor):
        return f"tile {arg.base.dtype} {list(arg.block_shape)} {arg.layout}"
    if isinstance(arg, int) and not isinstance(arg, bool):
        return _KIND_OF_INT[not -(2**31) <= arg < 2**31]
    return type(arg).__name__ if arg is not None else "None"


_collected: ContextVar[list[Launch] | None] = ContextVar("collected", default=None)
# The tensors of a launch are not kept: its key is what is recorded.
_recorded: ContextVar[set[tuple[Any, ...]] | None] = ContextVar("recorded", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[list[Launch]]:
    """Launches inside are listed instead of run; ops may be given tensors of device "meta"."""
    found: list[Launch] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


class _Dropped(list[Launch]):
    def append(self, _: Launch) -> None:
        return


@contextlib.contextmanager
def dropping() -> Iterator[None]:
    """Launches inside are neither run nor listed: of ops on tensors of device "meta", what is left
    is the memory that they ask for."""
    token = _collected.set(_Dropped())
    try:
        yield
    finally:
        _collected.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[set[tuple[Any, ...]]]:
    """Keys (`Launch.key`) of the launches inside, which run; of this thread alone.

    Early launches are recorded as such also where they become plain ones under the interpreter.
    """
    keys: set[tuple[Any, ...]] = set()
    token = _recorded.set(keys)
    try:
        yield keys
    finally:
        _recorded.reset(token)


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` for a kernel: no integer argument decides what is compiled."""
    # Parameters without a constexpr annotation; tensors among them are specialised on alignment
    # by their kind, which the name "_ptr" (or "_desc") tells.
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    notes = function.__annotations__
    plain = [n for n in names if n not in notes and not n.endswith(("_ptr", "_desc"))]
    return triton.jit(function, do_not_specialize=plain)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs kernel over grid with positional args and constexprs or launch options by name.

    An empty grid launches nothing. Products and sums are not contracted unless the caller says
    `enable_fp_fusion=True`. An early launch (`launch_pdl` and the kernel's constexpr PDL, which
    are one choice) becomes a plain one where the GPU has none, and under the interpreter.
    """
    if 0 in grid:
        return
    options.setdefault("enable_fp_fusion", False)
    if not can_overlap():
        _make_plain(options)
    collected = _collected.get()
    if collected is not None:
        collected.append(Launch(kernel=kernel, args=args, options=options))
        return
    recorded = _recorded.get()
    if recorded is not None:
        recorded.add(Launch(kernel=kernel, args=args, options=options).key)
    if not isinstance(kernel, InterpretedFunction):
        kernel[grid](*args, **options)
        return
    _make_plain(options)
    with np.errstate(all="ignore"):  # a GPU does not warn of inf and NaN
        kernel[grid](*args, **options)


def _make_plain(options: dict[str, Any]) -> None:
    if options.pop("launch_pdl", False):
        options["PDL"] = False


class _AbsentDevice:
    """What Triton asks of a driver in order to compile, answered for a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return -1  # no real device's kernel cache is touched

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(capability: int) -> Iterator[None]:
    """Makes `Launch.compile` build for compute capability `capability` (90 = Hopper)."""
    before = driver._active
    driver.set_active(_AbsentDevice(GPUTarget("cuda", capability, 32)))
    try:
        yield
    finally:
        driver._active = before


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a compiled kernel takes of a multiprocessor."""

    registers: int  # per thread
    stack: int  # bytes per thread, spills included
    shared: int  # bytes per program
    warps: int
    wgmma: int  # instructions in the code
    mma: int


def resources(compiled: Any) -> Resources:
    """Read from the machine code of `Launch.compile`'s result."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    usage = _run_tool([folder / "cuobjdump", "-res-usage"], compiled.asm["cubin"])
    code = _run_tool([folder / "nvdisasm", "-c"], compiled.asm["cubin"])
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    stack = max(int(n) for n in re.findall(r"STACK:(\d+)", usage))
    return Resources(
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        wgmma=len(re.findall(r"\b[HQI]GMMA", code)),
        mma=len(re.findall(r"\b[HIQ]MMA", code)),
    )


def _run_tool(command: Sequence[Path | str], cubin: bytes) -> str:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(part) for part in [*command, file.name]],
            capture_output=True,
            text=True,
            check=True,
        )
    return done.stdout
