"""Runs an op against its reference with poisoned outputs; knows specs, no particular op."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from octavo_kernels.op import Case, OpSpec

_CANARY = 64  # elements before and after an output
_CANARY_VALUE = 12345.0


def gpu_device() -> str:
    """Where GPU kernels are tested: "cuda", or "cpu" for Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def generator_for(spec: OpSpec, case: Case) -> torch.Generator:
    """A generator seeded by the names alone, so that a failure repeats."""
    return torch.Generator().manual_seed(zlib.crc32(f"{spec.name}/{case.name}".encode()))


def inputs_for(spec: OpSpec, case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """The case's inputs, fresh tensors every time."""
    return spec.make_inputs(case, dtype, torch.device(device), generator_for(spec, case))


def widen(value: Any) -> Any:
    """Float tensors as float64 copies, other tensors as copies, containers recursively."""
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64) if value.is_floating_point() else value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(widen(item) for item in value)
    return value


def guarded_empty(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """A tensor of NaN (of the lowest value, if integer) between canaries, and the whole store."""
    count = 1
    for size in shape:
        count *= size
    store = torch.full((count + 2 * _CANARY,), _CANARY_VALUE, dtype=dtype, device=device)
    poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    store[_CANARY : _CANARY + count] = poison
    return store[_CANARY : _CANARY + count].view(shape), store


def assert_canaries(store: Tensor, what: str) -> None:
    """Asserts that nothing was written before or after a guarded tensor."""
    for side, part in (("before", store[:_CANARY]), ("after", store[-_CANARY:])):
        assert bool((part == _CANARY_VALUE).all()), f"{what}: written {side} its bounds"


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same bits (NaN equals itself, 0.0 is not -0.0)."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = sizes[left.element_size()]
    return torch.equal(left.contiguous().view(kind), right.contiguous().view(kind))


def _assert_close(got: Tensor, want: Tensor, spec: OpSpec, dtype: torch.dtype, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    if not got.is_floating_point():
        assert torch.equal(got, want.to(got.dtype)), f"{what}: integers differ"
        return
    tol = spec.tolerance[dtype]
    torch.testing.assert_close(
        got.to(torch.float64),
        want.to(torch.float64),
        atol=tol.atol,
        rtol=tol.rtol,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def check_case(spec: OpSpec, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Asserts one case: reference agreement, canaries, poison overwritten, same bits twice."""
    inputs = inputs_for(spec, case, dtype, device)
    wide = {name: widen(value) for name, value in inputs.items()}
    want = _as_tuple(spec.reference(**wide))
    got = _as_tuple(spec.op(**inputs))
    what = f"{spec.name} {case} {dtype}"
    for index, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        _assert_close(mine, theirs, spec, dtype, f"{what} result {index}")
    for name in spec.mutated:
        pairs = zip(_tensors(inputs[name]), _tensors(wide[name]), strict=True)
        for mine, theirs in pairs:
            _assert_close(mine, theirs, spec, dtype, f"{what} {name} after the call")
    if spec.takes_out:
        _check_out(spec, case, dtype, device, got[0])
    else:
        again = _as_tuple(spec.op(**inputs_for(spec, case, dtype, device)))
        assert all(map(same_bits, got, again)), f"{what}: two calls differ"


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _check_out(spec: OpSpec, case: Case, dtype: torch.dtype, device: str, first: Tensor) -> None:
    out, store = guarded_empty(tuple(first.shape), first.dtype, device)
    returned = spec.op(**inputs_for(spec, case, dtype, device), out=out)
    what = f"{spec.name} {case} {dtype} out="
    assert returned is out, f"{what}: another tensor was returned"
    assert_canaries(store, what)
    assert same_bits(out, first), f"{what}: bits differ from the call without out"


def check_rows(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    max_selections: int | None = None,
) -> None:
    """Asserts that selecting, repeating or permuting rows selects the result's bits."""
    whole = inputs_for(spec, case, dtype, device)
    num_rows = int(whole[spec.rows[0]].shape[0])
    full = _as_tuple(spec.op(**_take(whole, spec.rows, torch.arange(num_rows))))[0]
    generator = generator_for(spec, case)
    shuffled = torch.randperm(num_rows, generator=generator)
    selections = [shuffled, torch.arange(0), shuffled[: (num_rows + 1) // 2]]
    selections += [
        torch.tensor([row]) for row in sorted({0, num_rows // 2, num_rows - 1}) if row >= 0
    ]
    selections += [torch.cat([shuffled, shuffled, torch.arange(num_rows)])]
    selections += [torch.arange(min(size, num_rows)) for size in range(1, 9)]
    for rows in selections[:max_selections]:
        if num_rows == 0 and len(rows):
            continue
        part = _as_tuple(spec.op(**_take(whole, spec.rows, rows)))[0]
        assert same_bits(part, full[rows]), f"{spec.name} {case} {dtype}: bits depend on the batch"


def _take(inputs: Mapping[str, Any], names: tuple[str, ...], rows: Tensor) -> dict[str, Any]:
    """Copies, since an op may write its inputs in place."""
    taken = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            taken[name] = value[rows].contiguous() if name in names else value.clone()
    return taken
