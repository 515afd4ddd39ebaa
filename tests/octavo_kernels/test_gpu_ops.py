"""Every GPU op against its reference, on the GPU or else in Triton's interpreter."""

import pytest
import torch

from octavo_kernels.op import Case, OpSpec, all_specs
from octavo_kernels.testing import check_case, check_rows, gpu_device

PARAMETERS = [
    pytest.param(spec, case, dtype, id=f"{spec.name}-{case.name}-{str(dtype)[6:]}")
    for spec in all_specs("gpu_spec")
    for case in spec.cases
    for dtype in spec.tolerance
]
# The interpreter is slow: a permutation, no row, half and single rows in one dtype.
SELECTIONS = None if torch.cuda.is_available() else 5


def _is_checked_by_row(spec: OpSpec, dtype: torch.dtype) -> bool:
    return bool(spec.rows) and (
        torch.cuda.is_available() or dtype == min(spec.tolerance, key=lambda d: d.itemsize)
    )


@pytest.mark.parametrize(("spec", "case", "dtype"), PARAMETERS)
def test_op_agrees_with_its_reference(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    check_case(spec, case, dtype, gpu_device())


@pytest.mark.parametrize(
    ("spec", "case", "dtype"),
    [p for p in PARAMETERS if _is_checked_by_row(p.values[0], p.values[2])],  # type: ignore[arg-type]
)
def test_a_row_has_the_same_bits_in_every_batch(
    spec: OpSpec, case: Case, dtype: torch.dtype
) -> None:
    check_rows(spec, case, dtype, gpu_device(), max_selections=SELECTIONS)
