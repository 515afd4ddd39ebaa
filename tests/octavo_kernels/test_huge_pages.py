"""Memory on huge pages: zeros of their own, whatever their sizes and whoever else is gone."""

from __future__ import annotations

import gc

import pytest
import torch

from octavo_kernels import huge_pages


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_tensors_are_zeros_that_overlap_no_other(dtype: torch.dtype) -> None:
    kept = []
    for number, rows in enumerate((1, 7, 300, 301, 5000, 40_000, 3, 9000), start=1):
        tensor = huge_pages.zeros((rows, 33, 5), dtype)
        assert tensor.shape == (rows, 33, 5)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert not tensor.any()
        tensor.fill_(number)
        if number % 3:
            kept.append((number, tensor))
        del tensor
        gc.collect()
    for number, tensor in kept:
        assert (tensor == number).all()


def test_an_empty_tensor_is_no_exception() -> None:
    assert huge_pages.zeros((0, 16), torch.float32).shape == (0, 16)
