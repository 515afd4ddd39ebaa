"""Logits to tokens and log-probabilities, each row from its own values alone. Knows no request.

`apply_logit_params` changes logits by the requests' parameters, `sample` draws a token per row,
`topn_logprobs` scores tokens. Equal logits at a filter's threshold stay or go together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo_kernels import parallel
from octavo_kernels.op import require_device
from octavo_kernels.sampling import cpu, cpu_logprobs, cpu_params
from octavo_kernels.sampling.cpu import ALL_FORBIDDEN, NON_FINITE, OK
from octavo_kernels.sampling.reference import (
    draws_reference,
    filtered_probs_reference,
    philox_reference,
    sample_reference,
    topn_logprobs_reference,
)

if TYPE_CHECKING:
    from octavo_kernels.sampling.gpu import GpuWorkspace
    from octavo_kernels.sampling.gpu_params import GpuLogitParams

__all__ = [
    "ALL_FORBIDDEN",
    "NON_FINITE",
    "OK",
    "LogitParams",
    "SamplingColumns",
    "TopLogprobs",
    "Workspace",
    "apply_logit_params",
    "draws_reference",
    "filtered_probs_reference",
    "kernels",
    "philox_reference",
    "sample",
    "sample_reference",
    "sample_slots",
    "topn_logprobs",
    "topn_logprobs_reference",
    "warm",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Scratch memory of the sampling ops for one vocabulary size, to be kept between calls."""

    vocab_size: int
    num_parts: int
    scratch: Tensor  # uint8, 64-byte aligned parts
    counts: Tensor  # [num_parts, V] int32, zero between calls

    @classmethod
    def create(cls, vocab_size: int) -> Workspace:
        """Scratch for as many threads as kernels use now."""
        parts = parallel.num_threads()
        size = parts * cpu.workspace_bytes(vocab_size) + 64
        return cls(
            vocab_size=vocab_size,
            num_parts=parts,
            scratch=torch.empty(size, dtype=torch.uint8),
            counts=torch.zeros(parts, vocab_size, dtype=torch.int32),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitParams:
    """Parameters of N slots (places of live requests), contiguous tensors on the CPU.

    ``x_starts`` [N + 1] int32 delimit a slot's part of ``x_ids``; an empty part means none.
    Slot n's bad words are ``bad_starts[n]`` to ``bad_starts[n + 1]`` of ``word_starts`` [W + 1],
    which delimits them in ``bad_ids``. Ids outside the vocabulary are passed over.
    """

    token_ids: Tensor  # [N, L] int32: prompt, then output
    num_prompt_tokens: Tensor  # [N] int32
    num_tokens: Tensor  # [N] int32
    repetition_penalty: Tensor  # [N] float32, 1 = none
    frequency_penalty: Tensor  # [N] float32
    presence_penalty: Tensor  # [N] float32
    min_tokens: Tensor  # [N] int32: stop ids are forbidden until the output is this long
    bias_starts: Tensor
    bias_ids: Tensor  # int32
    bias_values: Tensor  # float32
    allowed_starts: Tensor
    allowed_ids: Tensor
    bad_starts: Tensor
    word_starts: Tensor
    bad_ids: Tensor
    stop_starts: Tensor
    stop_ids: Tensor


class SamplingColumns:
    """`sample`'s parameters of N slots, in arrays that their owner may write to at any time."""

    __slots__ = ("_arrays", "addresses", "num_slots")

    def __init__(
        self,
        *,
        temperature: npt.NDArray[np.float32],
        top_k: npt.NDArray[np.int32],
        top_p: npt.NDArray[np.float32],
        min_p: npt.NDArray[np.float32],
        seeds: npt.NDArray[np.int64],
    ) -> None:
        arrays: tuple[npt.NDArray[Any], ...] = (temperature, top_k, top_p, min_p, seeds)
        dtypes = ["float32", "int32", "float32", "float32", "int64"]
        assert [array.dtype.name for array in arrays] == dtypes
        for array in arrays:
            assert array.shape == seeds.shape and array.flags.c_contiguous
        self.num_slots = len(seeds)
        self.addresses = tuple(array.ctypes.data for array in arrays)
        self._arrays = arrays  # which own the memory behind the addresses


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogprobs:
    """Scores of S rows. Values of rows whose ``status`` is not OK are undefined."""

    chosen: Tensor  # [S] float32
    ranks: Tensor  # [S] int32: 1 + number of tokens with a greater logit
    ids: Tensor  # [S, n] int32, best first, ties by lower id
    logprobs: Tensor  # [S, n] float32
    status: Tensor  # [S] int32: OK or NON_FINITE


def _check_logits(op: str, logits: Tensor) -> None:
    require_device(op, logits, have=("cpu", "cuda"))
    if logits.dtype != torch.float32 or logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError(f"{op} takes contiguous float32 [S, V], got {logits.dtype} {logits.shape}")


def _check_column(op: str, name: str, column: Tensor, dtype: torch.dtype, size: int) -> None:
    if column.dtype != dtype or column.shape != (size,) or not column.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be {dtype} [{size}], got {column.dtype} {list(column.shape)}"
        )


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    workspace: Workspace | GpuWorkspace | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per row: (tokens [S] int64, status [S] int32).

    logits: [S, V] float32. temperature, top_p, min_p: [S] float32; top_k: [S] int32; seeds,
    positions: [S] int64 (seeds are 64 bits). Temperature 0 takes the lowest id of the greatest
    logit. Otherwise min_p, top_k (0 = none) and top_p filter the tokens at that temperature, and
    the draw depends on the row's logits, seed and position only. Status is OK, NON_FINITE (NaN or
    +inf present) or ALL_FORBIDDEN (every logit is -inf); tokens of failed rows are -1.
    On a GPU also bfloat16 and float16 logits; the same tokens, as no result hangs on the device.
    """
    if logits.is_cuda:
        from octavo_kernels.sampling import gpu  # here: an installation for the CPU has no Triton

        assert workspace is None or not isinstance(workspace, Workspace)
        return gpu.sample(
            logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seeds=seeds,
            positions=positions,
            workspace=workspace,
        )
    _check_logits("sample", logits)
    num_rows, vocab_size = logits.shape
    floats = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
    for name, column in floats.items():
        _check_column("sample", name, column, torch.float32, num_rows)
    _check_column("sample", "top_k", top_k, torch.int32, num_rows)
    _check_column("sample", "seeds", seeds, torch.int64, num_rows)
    _check_column("sample", "positions", positions, torch.int64, num_rows)
    if workspace is None:
        workspace = Workspace.create(vocab_size)
    assert isinstance(workspace, Workspace) and workspace.vocab_size == vocab_size
    tokens = torch.empty(num_rows, dtype=torch.int64)
    status = torch.empty(num_rows, dtype=torch.int32)
    cpu.sample_rows(
        min(num_rows, workspace.num_parts),
        logits.data_ptr(),
        num_rows,
        vocab_size,
        0,
        num_rows,
        temperature.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        min_p.data_ptr(),
        seeds.data_ptr(),
        positions.data_ptr(),
        tokens.data_ptr(),
        status.data_ptr(),
        (workspace.scratch.data_ptr() + 63) // 64 * 64,
        cpu.workspace_bytes(vocab_size),
    )
    return tokens, status


def sample_slots(
    logits: Tensor,
    *,
    columns: SamplingColumns,
    slots: npt.NDArray[np.int32],
    positions: npt.NDArray[np.int64],
    workspace: Workspace,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """`sample` on a CPU for rows whose parameters lie at ``slots`` [S] of the columns [N].

    For a worker's every step: nothing is gathered, and the columns were checked when they were
    made. Slots are not checked.
    """
    _check_logits("sample_slots", logits)
    num_rows, vocab_size = logits.shape
    assert workspace.vocab_size == vocab_size and len(slots) == len(positions) == num_rows
    assert slots.dtype == np.int32 and positions.dtype == np.int64
    tokens, status = np.empty(num_rows, np.int64), np.empty(num_rows, np.int32)
    cpu.sample_rows(
        min(num_rows, workspace.num_parts),
        logits.data_ptr(),
        num_rows,
        vocab_size,
        slots.ctypes.data,
        columns.num_slots,
        *columns.addresses,
        positions.ctypes.data,
        tokens.ctypes.data,
        status.ctypes.data,
        (workspace.scratch.data_ptr() + 63) // 64 * 64,
        cpu.workspace_bytes(vocab_size),
    )
    return tokens, status


def apply_logit_params(
    logits: Tensor,
    *,
    params: LogitParams | GpuLogitParams,
    rows: Tensor,
    slots: Tensor,
    num_drafts: Tensor | None = None,
    workspace: Workspace | None = None,
) -> None:
    """Changes logits [S, V] float32 in place: row rows[i] by the parameters of slot slots[i].

    rows, slots: [L] int32; no row twice. In order: allowed ids, bad words, minimum length and
    bias; then repetition penalty (over prompt and output), frequency and presence penalties (over
    output). num_drafts: [L] int32, so many tokens behind a slot's num_tokens are output too, as if
    accepted. On a GPU params are tables (`octavo_kernels.sampling.gpu_params`).
    """
    if logits.is_cuda:
        from octavo_kernels.sampling import gpu_params  # here: Triton, as above

        if isinstance(params, LogitParams):
            raise ValueError("apply_logit_params on a GPU takes GpuLogitParams, got LogitParams")
        gpu_params.apply_logit_params(
            logits, params=params, rows=rows, slots=slots, num_drafts=num_drafts
        )
        return
    if not isinstance(params, LogitParams):
        raise ValueError("apply_logit_params on a CPU takes LogitParams, got GpuLogitParams")
    _check_logits("apply_logit_params", logits)
    num_rows, vocab_size = logits.shape
    _check_column("apply_logit_params", "rows", rows, torch.int32, rows.shape[0])
    _check_column("apply_logit_params", "slots", slots, torch.int32, rows.shape[0])
    if num_drafts is not None:
        _check_column("apply_logit_params", "num_drafts", num_drafts, torch.int32, rows.shape[0])
    if workspace is None:
        workspace = Workspace.create(vocab_size)
    assert workspace.vocab_size == vocab_size
    addresses = [getattr(params, name).data_ptr() for name in cpu_params.COLUMNS]
    table = np.array(addresses, np.int64)
    cpu_params.apply_params(
        min(rows.shape[0], workspace.num_parts),
        logits.data_ptr(),
        num_rows,
        vocab_size,
        rows.data_ptr(),
        slots.data_ptr(),
        0 if num_drafts is None else num_drafts.data_ptr(),
        rows.shape[0],
        table.ctypes.data,
        *params.token_ids.shape,
        workspace.counts.data_ptr(),
    )


def topn_logprobs(logits: Tensor, *, chosen: Tensor, num_best: int) -> TopLogprobs:
    """Log-softmax scores of logits [S, V] float32: of chosen [S] int64 and the num_best tokens.

    Nothing of size [S, V] is made. Raises ValueError where num_best is negative or above V, or
    (on the CPU) a chosen token is outside the vocabulary.
    """
    if logits.is_cuda:
        from octavo_kernels.sampling import gpu  # here: Triton, as above

        return gpu.topn_logprobs(logits, chosen=chosen, num_best=num_best)
    _check_logits("topn_logprobs", logits)
    num_rows, vocab_size = logits.shape
    _check_column("topn_logprobs", "chosen", chosen, torch.int64, num_rows)
    if not 0 <= num_best <= vocab_size:
        raise ValueError(f"num_best must be between 0 and {vocab_size}, got {num_best}")
    if num_rows and not (int(chosen.min()) >= 0 and int(chosen.max()) < vocab_size):
        raise ValueError(f"chosen tokens must be between 0 and {vocab_size - 1}")
    parts = min(num_rows, parallel.num_threads())
    tiles = -(-vocab_size // cpu.TILE)
    work = torch.empty(parts, 2, tiles, dtype=torch.int32)
    found = TopLogprobs(
        chosen=torch.empty(num_rows),
        ranks=torch.empty(num_rows, dtype=torch.int32),
        ids=torch.empty(num_rows, num_best, dtype=torch.int32),
        logprobs=torch.empty(num_rows, num_best),
        status=torch.empty(num_rows, dtype=torch.int32),
    )
    cpu_logprobs.logprob_rows(
        parts,
        logits.data_ptr(),
        num_rows,
        vocab_size,
        chosen.data_ptr(),
        num_best,
        found.chosen.data_ptr(),
        found.ranks.data_ptr(),
        found.ids.data_ptr(),
        found.logprobs.data_ptr(),
        found.status.data_ptr(),
        work.data_ptr(),
    )
    return found


def kernels() -> tuple[parallel.Kernel, ...]:
    """What a server calls."""
    return (cpu.sample_rows, cpu_params.apply_params, cpu_logprobs.logprob_rows)


def warm() -> None:
    """Compiles, or loads from disk, every sampling kernel."""
    for kernel in kernels():
        assert kernel.address
