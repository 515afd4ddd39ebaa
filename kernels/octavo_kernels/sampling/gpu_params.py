"""Requests' logit parameters in GPU memory: their tables, and what keeps and applies them.

Every size is fixed when the tables are made, so launches hold in a captured graph; knows slots and
token ids, no request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_kernels.launch import launch
from octavo_kernels.sampling import LogitParams
from octavo_kernels.sampling.gpu import check_column, check_logits
from octavo_kernels.sampling.gpu_params_kernel import (
    clear_slots,
    edit_rows,
    extend_slots,
    fill_slots,
    penalise_rows,
)

_TILE = 4096
_FILL_PARTS = 16
_STARTS = ("bias_starts", "allowed_starts", "bad_starts", "stop_starts")
_LISTS = ("bias_ids", "allowed_ids", "bad_ids", "stop_ids")
_COLUMNS = ("num_prompt_tokens", "num_tokens", "min_tokens")
_FLOATS = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLogitParams:
    """Parameters of N slots on a GPU. The tensors stay; their contents change.

    `lists` are the CPU op's columns with two differences: an id list may be longer than its starts
    say, and a slot's bias names no token twice. Who gives a slot to a request writes its columns
    and lists and then calls `load_slots`; `extend` follows what the slot draws.
    """

    vocab_size: int
    lists: LogitParams
    counts: Tensor  # [N, V] int32: 2 * times in the output + 1 if in the prompt
    allowed: Tensor  # [N, ceil(V / 32)] int32: bit t % 32 of word t // 32 = token t is allowed
    grammar: Tensor  # the same, written by who follows a grammar; rows without one may be anything
    has_grammar: Tensor  # [N] int32: whether `grammar` applies

    @classmethod
    def create(
        cls,
        *,
        num_slots: int,
        vocab_size: int,
        max_tokens: int,
        list_capacity: int,
        device: torch.device | str,
    ) -> GpuLogitParams:
        """Neutral parameters: 4 bytes of counts and 2 bits of masks per slot and token.

        max_tokens: of a slot's prompt and output; list_capacity: entries of each list, all slots
        together, and bad words.
        """

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        columns = {name: zeros(num_slots) for name in _COLUMNS}
        columns |= {name: zeros(num_slots + 1) for name in _STARTS}
        columns |= {name: zeros(list_capacity) for name in _LISTS}
        for name, neutral in _FLOATS.items():
            columns[name] = torch.full((num_slots,), neutral, device=device)
        words = -(-vocab_size // 32)
        return cls(
            vocab_size=vocab_size,
            lists=LogitParams(
                token_ids=zeros(num_slots, max_tokens),
                bias_values=zeros(list_capacity, dtype=torch.float32),
                word_starts=zeros(list_capacity + 1),
                **columns,
            ),
            counts=zeros(num_slots, vocab_size),
            allowed=zeros(num_slots, words),
            grammar=zeros(num_slots, words),
            has_grammar=zeros(num_slots),
        )

    @property
    def num_slots(self) -> int:
        return int(self.counts.shape[0])


def load_slots(params: GpuLogitParams, slots: Tensor) -> None:
    """Makes counts and allowed masks of slots [L] int32 from their columns and lists.

    Negative slots are passed over, so that a captured launch can have room to spare.
    """
    check_column("load_slots", params.counts, "slots", slots, torch.int32, slots.shape[0])
    lists = params.lists
    words = params.allowed.shape[1]
    tiles = -(-params.vocab_size // _TILE)
    sizes = {"VOCAB": params.vocab_size, "WORDS": words}
    launch(
        clear_slots,
        (len(slots) * tiles,),
        slots,
        params.counts,
        params.allowed,
        params.num_slots,
        **sizes,
        NUM_TILES=tiles,
        TILE=_TILE,
        num_warps=4,
    )
    launch(
        fill_slots,
        (len(slots) * _FILL_PARTS,),
        slots,
        lists.token_ids,
        lists.num_prompt_tokens,
        lists.num_tokens,
        lists.allowed_starts,
        lists.allowed_ids,
        params.counts,
        params.allowed,
        params.num_slots,
        lists.token_ids.shape[1],
        lists.allowed_ids.shape[0],
        **sizes,
        NUM_PARTS=_FILL_PARTS,
        TILE=256,
        num_warps=4,
    )


def extend(params: GpuLogitParams, *, slots: Tensor, tokens: Tensor) -> None:
    """Appends tokens [L] or [L, K] int64 to the outputs of slots [L] int32, no slot twice.

    Negative tokens (a failed row's, or unused places of K) and negative slots append nothing.
    """
    num_listed = slots.shape[0]
    check_column("extend", params.counts, "slots", slots, torch.int32, num_listed)
    if tokens.dtype != torch.int64 or tokens.dim() not in (1, 2) or not tokens.is_contiguous():
        raise ValueError(f"extend takes int64 tokens [L] or [L, K], got {tokens.dtype}")
    if tokens.shape[0] != num_listed:
        raise ValueError(f"extend: {num_listed} slots, but tokens of {tokens.shape[0]}")
    lists = params.lists
    launch(
        extend_slots,
        (-(-num_listed // 128),),
        slots,
        tokens,
        lists.token_ids,
        lists.num_tokens,
        params.counts,
        num_listed,
        params.num_slots,
        lists.token_ids.shape[1],
        VOCAB=params.vocab_size,
        STEPS=tokens.shape[1] if tokens.dim() == 2 else 1,
        BLOCK=128,
        num_warps=4,
    )


def apply_logit_params(
    logits: Tensor,
    *,
    params: GpuLogitParams,
    rows: Tensor,
    slots: Tensor,
    num_drafts: Tensor | None = None,
) -> None:
    """Changes logits [S, V] in place: row rows[i] by the parameters of slot slots[i].

    rows, slots: [L] int32, no row twice; entries with a negative row or slot are passed over.
    The CPU op's order: allowed ids and grammar, bad words, minimum length and bias; then
    repetition, frequency and presence penalties. Computed in float32; logits of another dtype are
    rounded after the bias and after the penalties. Counts are those of `load_slots` and `extend`.
    num_drafts: [L] int32, so many tokens behind a slot's num_tokens are output too, as if `extend`
    had appended them.
    """
    op = "apply_logit_params"
    check_logits(op, logits)
    num_rows, vocab_size = logits.shape
    if vocab_size != params.vocab_size:
        raise ValueError(f"{op}: params are of {params.vocab_size} tokens, got {vocab_size}")
    num_listed = rows.shape[0]
    check_column(op, logits, "rows", rows, torch.int32, num_listed)
    check_column(op, logits, "slots", slots, torch.int32, num_listed)
    if num_drafts is not None:
        check_column(op, logits, "num_drafts", num_drafts, torch.int32, num_listed)
    lists = params.lists
    launch(
        edit_rows,
        (num_listed,),
        logits, rows, slots, num_drafts, *_edits(lists),
        num_rows, params.num_slots, lists.token_ids.shape[1],
        *(ids.shape[0] for ids in (lists.bias_ids, lists.bad_ids, lists.stop_ids)),
        VOCAB=vocab_size, BLOCK=128, num_warps=4,
    )  # fmt: skip
    tiles = -(-vocab_size // _TILE)
    launch(
        penalise_rows,
        (num_listed * tiles,),
        logits,
        rows,
        slots,
        num_drafts,
        lists.token_ids,
        lists.num_tokens,
        lists.repetition_penalty,
        lists.frequency_penalty,
        lists.presence_penalty,
        params.counts,
        lists.allowed_starts,
        params.allowed,
        params.has_grammar,
        params.grammar,
        num_rows,
        params.num_slots,
        lists.token_ids.shape[1],
        VOCAB=vocab_size,
        WORDS=params.allowed.shape[1],
        NUM_TILES=tiles,
        TILE=_TILE,
        num_warps=8,
    )


def _edits(lists: LogitParams) -> Sequence[Tensor]:
    return (
        lists.token_ids,
        lists.num_prompt_tokens,
        lists.num_tokens,
        lists.min_tokens,
        lists.bias_starts,
        lists.bias_ids,
        lists.bias_values,
        lists.bad_starts,
        lists.word_starts,
        lists.bad_ids,
        lists.stop_starts,
        lists.stop_ids,
    )
