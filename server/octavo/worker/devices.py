"""Decides which kind of device a worker runs on. Knows what is there, nothing of a model."""

from __future__ import annotations

import importlib.util
import logging
from enum import Enum

import torch

_NEEDED = (8, 0)  # compute capability: bfloat16 and asynchronous copies

_log = logging.getLogger(__name__)


class DeviceKind(Enum):
    CPU = "cpu"
    CUDA = "cuda"
    INTERPRETED = "the GPU's engine on CPU tensors, in Triton's interpreter"


def choose_device(wanted: str) -> DeviceKind:
    """What ``--device`` comes to here. Raises ValueError where it cannot be had.

    ``auto`` is a GPU if there is one that can be used. Without one, ``cuda`` runs in Triton's
    interpreter if TRITON_INTERPRET is set, as tests do. The first to use CUDA in a process.
    """
    if wanted == "cpu":
        return DeviceKind.CPU
    is_there = torch.cuda.is_available()
    if wanted == "auto" and not is_there:
        return DeviceKind.CPU
    if not is_there and is_interpreting():
        _log.info("no CUDA device: kernels run in Triton's interpreter, for tests")
        return DeviceKind.INTERPRETED
    problem = _problem() if is_there else "torch finds no CUDA device"
    if problem is None:
        return DeviceKind.CUDA
    if wanted == "auto":
        _log.warning("the GPU is not used: %s", problem)
        return DeviceKind.CPU
    raise ValueError(f"device cuda cannot be used: {problem}. There is --device cpu")


def is_interpreting() -> bool:
    """Whether Triton's kernels are interpreted in this process."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs  # lazy: absent where only CPUs are served

    return bool(knobs.runtime.interpret)


def _hold_cublas() -> None:
    """Keeps cuBLAS to the same bits. Behind another user of CUDA in this process it cannot be kept
    to them, and gets no products, which is slower."""
    from octavo_kernels.matmul import cublas  # lazy: numba, which a CPU's start has a phase for

    try:
        cublas.hold_to_same_bits()
    except RuntimeError as error:
        _log.warning("large matrix products run on our own kernels alone: %s", error)


def _problem() -> str | None:
    """Why the CUDA device that is there cannot be used."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'octavo[gpu]')"
    if is_interpreting():
        return "TRITON_INTERPRET is set, which is for machines without a GPU"
    _hold_cublas()  # before the next line, which makes CUDA's context
    capability = torch.cuda.get_device_capability()
    if capability < _NEEDED:
        name = torch.cuda.get_device_name()
        has, needs = (f"{major}.{minor}" for major, minor in (capability, _NEEDED))
        return f"{name} has compute capability {has}, kernels need {needs}"
    return None
