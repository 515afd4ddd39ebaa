"""Keeps cuBLAS from splitting K, so that a row's bits do not depend on the batch. Knows no op."""

from __future__ import annotations

import os
import warnings

import torch
from torch import Tensor

# A split K needs workspace for its parts: with next to none, no such algorithm is left. Read by
# torch once, when it makes its first handle.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}

_held = False


def hold_to_same_bits() -> None:
    """Sets what keeps one order of summation; before this process's first work on a GPU.

    Measured on an H100: cuBLASLt then gives one chain over K for every shape of `speed.md` at
    every T; `gpu.prove_cublas` checks it for the shapes that a model has. Raises RuntimeError
    where CUDA has been in use with another environment: a handle may exist.
    """
    global _held
    if is_too_late():
        raise RuntimeError(
            f"cuBLAS can be held to the same bits only before CUDA is first used, or with"
            f" {ENVIRONMENT} in the environment"
        )
    os.environ.update(ENVIRONMENT)
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_reduced_precision_reduction = False
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_tf32 = False
    with warnings.catch_warnings():  # that the choice is experimental
        warnings.simplefilter("ignore")
        torch.backends.cuda.preferred_blas_library("cublaslt")
    _held = True


def is_too_late() -> bool:
    """Whether CUDA is in use already, and not with the environment that it takes."""
    differs = any(os.environ.get(name) != value for name, value in ENVIRONMENT.items())
    return differs and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def is_held() -> bool:
    """Whether `hold_to_same_bits` has been called in this process."""
    return _held


def product(x: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    """x [T, K] @ weight [N, K]^T into out [T, N], all of one dtype."""
    return torch.mm(x, weight.t(), out=out)
