"""Looks up launch choices measured per GPU kind, and says what can be measured. Measures nothing.

The table `tuned/<kind>.json` maps op -> key -> choices and is made by `python -m
octavo_kernels.tune`. A choice may change speed only: what decides bits (the order of a reduction)
is never in the table.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo_kernels.device import capability, is_hopper, is_pretended

Choice = Mapping[str, int]
_TABLES = Path(__file__).parent / "tuned"
_PRETENDED = {(9, 0): "h100", (8, 0): "a100"}
_KINDS = ("h100", "h200", "a100")


@functools.cache
def gpu_kind() -> str:
    """The current GPU's kind, "h100" for "NVIDIA H100 80GB HBM3"; "h100" where there is none."""
    if is_pretended():
        return _PRETENDED.get(capability(), "unknown")
    if not torch.cuda.is_available():
        return "h100"
    name = torch.cuda.get_device_name().lower()
    known = [kind for kind in _KINDS if kind in name]
    return known[0] if known else re.sub(r"[^a-z0-9]+", "_", name).strip("_")


@functools.cache
def table(kind: str) -> dict[str, dict[str, dict[str, int]]]:
    """All choices for a GPU kind; an unmeasured Hopper takes the H100's, another kind nothing."""
    path = _TABLES / f"{kind}.json"
    if not path.exists():
        path = _TABLES / "h100.json"
        if not (is_hopper() and path.exists()):
            return {}
    found: dict[str, dict[str, dict[str, int]]] = json.loads(path.read_text())["choices"]
    return found


@functools.cache
def _choose(op: str, key: str) -> dict[str, int] | None:
    return table(gpu_kind()).get(op, {}).get(key)


def choose(op: str, key: str, default: Choice) -> Choice:
    """What was measured best for this op and key on this kind of GPU, else default."""
    found = _choose(op, key)
    return default if found is None else found


@dataclass(frozen=True, slots=True, kw_only=True)
class Tunable:
    """An op whose launch choices are worth measuring.

    `keys` are the sizes the shipped table covers; `candidates(key)` the choices to try, the default
    first; `make(key, choice)` builds inputs on the device once (the same whatever the choice: torch
    is seeded before) and returns the launch to time, which returns what it computed, so that its
    bits can be compared with the default's. `make` reads no tensor's value: it is also called with
    every tensor on the device "meta", to find what there is to compile. `rotate` asks for up to so
    many input sets in turn, as many as it takes for weights or caches to be cold in L2. `prepare`,
    if given, is called once in a process that will measure, before it first uses the GPU.
    """

    op: str
    keys: tuple[str, ...]
    candidates: Callable[[str], Iterable[Choice]]
    make: Callable[[str, Choice], Callable[[], Any]]
    rotate: int = 1
    prepare: Callable[[], None] | None = None
