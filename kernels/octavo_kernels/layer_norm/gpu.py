"""Layer normalisation of rows on a GPU. Knows shapes and launches, not models."""

from __future__ import annotations

from torch import Tensor

from octavo_kernels.launch import launch
from octavo_kernels.layer_norm.gpu_kernel import layer_norm_rows
from octavo_kernels.row_tile import check_rows, check_vector, row_tile


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    use_pdl: bool = False,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension; [T, D] -> [T, D].

    float32, bfloat16 or float16, computed in float32 and rounded once. With residual [T, D]: first
    residual += x in place, and what gets normalised is that sum as rounded to its dtype.
    weight, bias [D] may have another of these dtypes. out may be x. use_pdl (GPU only): starts
    while the kernel before it in the stream still runs.
    A row's bits depend on that row alone. Raises ValueError for other shapes, dtypes or strides,
    D above 16384, and rows of a multiple of 16 bytes that do not start at one.
    """
    if x.dim() != 2:
        raise ValueError(f"layer_norm takes x [T, D], got {tuple(x.shape)}")
    num_rows, dim = x.shape
    tile = row_tile(dim, x.element_size())
    if out is None:
        out = x.new_empty(x.shape)
    check_rows("layer_norm", x, ("residual", residual), ("out", out), step=tile.step)
    check_vector("layer_norm", "weight", weight, x)
    if bias is not None:
        check_vector("layer_norm", "bias", bias, x)
    launch(
        layer_norm_rows,
        (-(-num_rows // tile.rows),),
        x,
        weight,
        bias,
        residual,
        out,
        num_rows,
        dim // tile.step,
        eps,
        D=dim,
        BLOCK_D=tile.block_d,
        ROWS=tile.rows,
        STEP=tile.step,
        PDL=use_pdl,
        num_warps=tile.num_warps,
        launch_pdl=use_pdl,
    )
    return out
