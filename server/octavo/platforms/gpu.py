"""A CUDA device: dense weights, activations of their dtype. Knows its kernels, no layer.

On tensors of the CPU the same kernels run in Triton's interpreter; on the device "meta" a model
takes no memory, and `octavo_kernels.launch.collecting` lists what it would launch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from octavo.attention.triton import TritonAttention
from octavo.checkpoint import ModelSpec
from octavo.platforms.base import Weight
from octavo_kernels.embedding.gpu import embedding
from octavo_kernels.matmul.gpu import linear, prove_cublas
from octavo_kernels.rms_norm.gpu import rms_norm
from octavo_kernels.shape import ModelShape


class _Staging(threading.local):
    """Pinned memory of one thread, through which rows go to a device: while one half is on its
    way, the other is filled."""

    def __init__(self) -> None:
        self._halves = [torch.empty(0, dtype=torch.uint8)] * 2
        self._sent: list[torch.cuda.Event | None] = [None, None]

    def send(self, rows: Tensor, target: Tensor) -> None:
        """target = rows, behind what the device has been given to do; rows may change at once."""
        self._halves.reverse()
        self._sent.reverse()
        sent = self._sent[0]
        if sent is None:
            sent = self._sent[0] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        sent.synchronize()
        num_bytes = target.nbytes
        if self._halves[0].nbytes < num_bytes:
            self._halves[0] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        staged = self._halves[0][:num_bytes].view(target.dtype).view(target.shape)
        staged.copy_(rows)
        target.copy_(staged, non_blocking=True)
        sent.record(torch.cuda.current_stream(target.device))


class GPUWeight:
    """`Weight` as a plain tensor [N, K]; activations are of its dtype."""

    block_kinds: tuple[str, ...] = ()

    def __init__(self, data: Tensor, *, staging: _Staging, use_pdl: bool) -> None:
        self._data = data
        self._staging = staging
        self._use_pdl = use_pdl
        self.n, self.k, self.num_bytes = *data.shape, data.nbytes

    def write(self, rows: Tensor, start: int) -> None:
        target = self._data[start : start + rows.shape[0]]
        assert target.shape == rows.shape, f"rows {list(rows.shape)} at {start} of {self.n}"
        if target.is_cuda and not rows.is_cuda:
            self._staging.send(rows, target)
        else:
            target.copy_(rows)

    def linear(
        self, x: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        return linear(x, self._data, bias=bias, residual=residual, use_pdl=self._use_pdl)

    def gated(self, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
        return linear(x, self._data, bias=bias, activation="silu_mul", use_pdl=self._use_pdl)

    def gated_then(
        self,
        down: Weight,
        x: Tensor,
        *,
        bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        hidden = self.gated(x, bias=bias)
        return down.linear(hidden, bias=down_bias, residual=residual)

    def logits(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        return linear(x, self._data, out=out, out_dtype=torch.float32, use_pdl=self._use_pdl)

    def rows(self, ids: Tensor) -> Tensor:
        return embedding(ids, self._data)


class GPUPlatform:
    """`Platform` of a CUDA device, or of its stand-ins. A row's bits depend on that row alone.

    use_pdl: kernels of few rows start while their predecessors still run, where the GPU can.
    Before CUDA is first used, `matmul.cublas.hold_to_same_bits` must have been called.
    """

    def __init__(self, device: torch.device | str = "cuda", *, use_pdl: bool = True) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.attention = TritonAttention(self.device, use_pdl=use_pdl)
        self._use_pdl = use_pdl
        self._staging = _Staging()
        self._products: dict[tuple[int, int, torch.dtype], None] = {}

    @property
    def products(self) -> tuple[tuple[int, int, torch.dtype], ...]:
        """(N, K, dtype) of the weights made so far, each kind once, that cuBLAS may multiply."""
        return tuple(self._products)

    def prove(self, row_counts: Iterable[int]) -> list[tuple[int, int, int]]:
        """Lets products of these numbers of rows go to cuBLAS where its bits are the tiles' bits.

        Until then, and where they differ, tiles serve: same bits, other speed. Waits for the GPU,
        and takes memory for one weight and two outputs of the largest product. Returns the
        (N, K, rows) that differ. Nothing to do without CUDA, or for float32.
        """
        row_counts = tuple(row_counts)
        differing: list[tuple[int, int, int]] = []
        if self.device.type != "cuda" or not row_counts:
            return differing
        with torch.cuda.device(self.device):
            for n, k, dtype in self._products:
                if dtype != torch.float32:
                    differing += prove_cublas([(n, k)], dtype, rows=row_counts)
        return differing

    def weight(self, n: int, k: int, *, dtype: torch.dtype, names: Sequence[str] = ()) -> GPUWeight:
        self._products[n, k, dtype] = None
        return self._matrix(n, k, dtype=dtype)

    def table(self, n: int, k: int, *, dtype: torch.dtype, names: Sequence[str] = ()) -> GPUWeight:
        return self._matrix(n, k, dtype=dtype)

    def _matrix(self, n: int, k: int, *, dtype: torch.dtype) -> GPUWeight:
        data = torch.empty(n, k, dtype=dtype, device=self.device)
        return GPUWeight(data, staging=self._staging, use_pdl=self._use_pdl)

    def vector(self, size: int, *, dtype: torch.dtype, value: float = 0.0) -> Tensor:
        return torch.full((size,), value, dtype=dtype, device=self.device)

    def rms_norm(
        self, x: Tensor, weight: Tensor, *, eps: float, out: Tensor | None = None
    ) -> Tensor:
        return rms_norm(x, weight, eps=eps, out=out, use_pdl=self._use_pdl)

    def copy_rows(self, x: Tensor, *, out: Tensor) -> None:
        out.copy_(x)

    def side_by_side(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], dim=1)


def model_shape(
    spec: ModelSpec, *, dtype: torch.dtype, cache_dtype: torch.dtype, block_size: int
) -> ModelShape:
    """What decides which kernels the decoder of spec needs, on a `GPUPlatform`.

    Raises ValueError for what no kernel has.
    """
    windows = set(spec.layer_windows) - {0}
    assert len(windows) <= 1, f"layers have windows of {windows}"
    return ModelShape(
        hidden=spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        ffn=spec.intermediate_size,
        vocab=spec.vocab_size,
        activation_dtype=dtype,
        cache_dtype=cache_dtype,
        block_size=block_size,
        rotary_dim=spec.rope.rotary_dim,
        has_qk_norm=spec.qk_norm,
        has_qkv_bias=spec.qkv_bias,
        has_output_bias=spec.output_bias,
        has_mlp_bias=spec.mlp_bias,
        sliding_window=max(windows, default=0),
    )
