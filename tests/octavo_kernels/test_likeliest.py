"""Rows that the op's general test does not have: equal values, and such as are not finite."""

from __future__ import annotations

import pytest
import torch

from octavo_kernels.likeliest import likeliest


def found(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    count = len(logits)
    return likeliest(logits, places=torch.zeros(count, dtype=torch.int32), probs=torch.zeros(count))


def test_the_first_of_equals_is_taken() -> None:
    logits = torch.full((2, 40), -3.0)
    logits[1, 17] = logits[1, 33] = 2.0
    places, probs = found(logits)
    assert places.tolist() == [0, 17]
    assert probs[0].item() == pytest.approx(1 / 40)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("column", [0, 15, 16, 36])
def test_a_row_that_is_not_finite_has_no_chance_and_its_neighbours_theirs(
    value: str, column: int
) -> None:
    logits = torch.randn(3, 37, generator=torch.Generator().manual_seed(1))
    want = logits.softmax(dim=1).amax(dim=1)
    logits[1, column] = float(value)
    _, probs = found(logits)
    assert probs[1].isnan()
    assert torch.allclose(probs[::2], want[::2])


def test_shapes_and_dtypes_that_do_not_fit_are_named() -> None:
    places, probs = torch.zeros(2, dtype=torch.int32), torch.zeros(2)
    with pytest.raises(ValueError, match=r"logits \[S, V\], V > 0"):
        likeliest(torch.zeros(2, 0), places=places, probs=probs)
    with pytest.raises(ValueError, match="places must be contiguous torch.int32"):
        likeliest(torch.zeros(2, 4), places=places.long(), probs=probs)
    with pytest.raises(ValueError, match="logits must be contiguous"):
        likeliest(torch.zeros(2, 8)[:, ::2], places=places, probs=probs)
