"""Every op against its reference, poisoned and bounded, and row by row bit for bit."""

import pytest
import torch

from octavo_kernels.op import Case, OpSpec, all_specs
from octavo_kernels.testing import check_case, check_rows

PARAMETERS = [
    pytest.param(spec, case, dtype, id=f"{spec.name}-{case.name}-{str(dtype)[6:]}")
    for spec in all_specs()
    for case in spec.cases
    for dtype in spec.tolerance
]


@pytest.mark.parametrize(("spec", "case", "dtype"), PARAMETERS)
def test_op_agrees_with_its_reference(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    check_case(spec, case, dtype)


@pytest.mark.parametrize(
    ("spec", "case", "dtype"),
    [p for p in PARAMETERS if isinstance(p.values[0], OpSpec) and p.values[0].rows],
)
def test_a_row_has_the_same_bits_in_every_batch(
    spec: OpSpec, case: Case, dtype: torch.dtype
) -> None:
    check_rows(spec, case, dtype)
