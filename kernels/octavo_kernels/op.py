"""Describes an op to its tests and benchmarks; knows no op, no kernel and no device."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tol:
    """Allowed |got - want| <= atol + rtol * |want|."""

    atol: float
    rtol: float


class Case:
    """One named set of sizes: `Case("odd", T=63, D=100).T == 63`. Immutable, hashable."""

    __slots__ = ("_items", "name")

    def __init__(self, name: str, **items: int | str) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "_items", dict(items))

    def __getattr__(self, key: str) -> Any:
        try:
            return self._items[key]
        except KeyError:
            raise AttributeError(
                f"case {self.name!r} has no {key!r}: {sorted(self._items)}"
            ) from None

    def __setattr__(self, key: str, value: object) -> None:
        raise AttributeError("a Case does not change")

    @property
    def items(self) -> Mapping[str, int | str]:
        """The sizes by name."""
        return dict(self._items)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{key}={value!r}" for key, value in self._items.items())
        return f"Case({self.name!r}, {sizes})"


MakeInputs = Callable[[Case, torch.dtype, torch.device, torch.Generator], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSpec:
    """Everything a test or a benchmark needs to know of one op.

    `op` and `reference` take what `make_inputs(case, dtype, device, generator)` returns, by name,
    and return a tensor or a tuple of tensors. The reference is plain torch, computes in the widest
    type among its inputs (it is handed float64 copies), and shares no code with the op. Inputs
    named in `mutated` are written in place and compared too. Inputs named in `rows` have the
    batch as first dimension: any selection of rows must give those rows' bits.
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    cases: tuple[Case, ...]
    make_inputs: MakeInputs
    tolerance: Mapping[torch.dtype, Tol]
    devices: tuple[str, ...] = ("cpu",)
    takes_out: bool = False
    mutated: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    bytes_moved: Callable[[Case, int], float] = field(default=lambda case, itemsize: 0.0)
    flops: Callable[[Case], float] = field(default=lambda case: 0.0)
    # What a benchmark compares with, same inputs: name -> function
    baselines: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    bench_cases: tuple[Case, ...] = ()


def no_kernel(op: str, tensor: Tensor, *, have: tuple[str, ...] = ("cpu",)) -> ValueError:
    """The refusal to raise where `op` has no kernel for the tensor's device."""
    return ValueError(
        f"{op} has no kernel for device {tensor.device.type!r}; it has {', '.join(have)}"
    )


def require_device(op: str, tensor: Tensor, *, have: tuple[str, ...] = ("cpu",)) -> None:
    """Raises ValueError where `op` has no kernel for the tensor's device."""
    if tensor.is_cpu and "cpu" in have:  # the usual case, without making a device's name
        return
    if tensor.device.type not in have:
        raise no_kernel(op, tensor, have=have)


def all_specs(file: str = "spec") -> list[OpSpec]:
    """Every SPEC or SPECS of octavo_kernels/<op>/<file>.py, by name; "gpu_spec" needs triton."""
    package = Path(__file__).parent
    found: list[OpSpec] = []
    for path in sorted(package.glob(f"*/{file}.py")):
        module = importlib.import_module(f"{__package__}.{path.parent.name}.{file}")
        one = getattr(module, "SPEC", None)
        found += [one] if one is not None else list(module.SPECS)
    names = [spec.name for spec in found]
    assert len(set(names)) == len(names), f"two specs of one name: {names}"
    return sorted(found, key=lambda spec: spec.name)
