"""Compiles the GPU kernels that a server of a model's shape will need, before it does.

What is compiled depends on nothing of a step but a few buckets of its lengths, so the few batches
of `op_runs.batches` stand for all others.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import triton

from octavo_kernels import device
from octavo_kernels.compiling import compile_all, distinct
from octavo_kernels.launch import Launch, collecting
from octavo_kernels.op_runs import RUNS, Scene, batches
from octavo_kernels.shape import ModelShape


def launches(shape: ModelShape) -> list[Launch]:
    """Every launch that differs in machine code; needs no GPU."""
    with collecting() as found:
        for batch in batches():
            for run in RUNS.values():
                run(Scene(shape, batch, "meta"))
    return distinct(found)


def warm(shape: ModelShape, *, processes: int | None = None) -> list[Launch]:
    """Compiles what `launches` lists for this machine's GPU and loads it; returns the list.

    Raises RuntimeError where there is no GPU, and for kernels that do not compile.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device: launches(shape) lists what would be compiled")
    found = launches(shape)
    major, minor = device.capability()
    capability = 10 * major + minor
    if not is_compiled(found, capability=capability):
        failed = compile_into_cache(found, capability=capability, processes=processes)
        if failed:
            what = "; ".join(f"{found[index].name}: {why}" for index, why in failed.items())
            raise RuntimeError(f"{len(failed)} of {len(found)} kernels do not compile: {what}")
    unloaded = [(launch.name, why) for launch in found if (why := _load(launch)) is not None]
    if unloaded:
        what = "; ".join(f"{name}: {why}" for name, why in unloaded)
        raise RuntimeError(f"{len(unloaded)} of {len(found)} kernels cannot be loaded: {what}")
    return found


def is_compiled(found: Sequence[Launch], *, capability: int) -> bool:
    """Whether `compile_into_cache` has seen all of these, for this very Triton and GPU."""
    return _stamp(found, capability).exists()


def compile_into_cache(
    found: Sequence[Launch], *, capability: int, processes: int | None = None
) -> dict[int, str]:
    """Fills Triton's disk cache for `capability` (90 = Hopper); what failed by index, and why.

    Needs no GPU: list the launches inside `device.pretending`.
    """
    failed = compile_all(found, capability=capability, processes=processes)
    if not failed:
        _touch(_stamp(found, capability))
    return failed


def _stamp(found: Iterable[Launch], capability: int) -> Path:
    """A file beside Triton's cache that says these very kernels are in it.

    If they no longer are, they are compiled one after another, which only takes longer.
    """
    digest = hashlib.sha256(f"{triton.__version__} {capability}".encode())
    for launch in found:
        digest.update(f"{launch.key} {launch.kernel.cache_key}".encode())
    return Path(triton.knobs.cache.dir) / f"octavo-{digest.hexdigest()}"


def _touch(stamp: Path) -> None:
    # Without a writable directory Triton keeps nothing either.
    with contextlib.suppress(OSError):
        stamp.touch()


def _load(launch: Launch) -> str | None:
    """Puts machine code on the GPU now, not at the first launch; why not, if it cannot."""
    compiled = launch.compile()
    if not hasattr(compiled, "_init_handles"):
        return None
    # Whatever it is: all that cannot be loaded are told together.
    try:
        compiled._init_handles()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
