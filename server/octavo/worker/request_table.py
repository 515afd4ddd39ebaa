"""What the worker knows of each live request, one row each. Knows ids and counts, no K/V.

Arrays are allocated at full size and never touched before use, so a long context costs memory
only once a request reaches it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from octavo.sampling import LogitParamsTable, SamplingColumns
from octavo.types import NewRequest, SamplingParams, SchedulerOutput


class RequestTable:
    """Rows of requests, kept by the scheduler's diffs.

    token_ids [N, L] int32 holds a request's known tokens [0, num_tokens); the K/V of
    [0, num_computed_tokens) are in its blocks, block_tables [N, max_blocks] int32.
    """

    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.block_size = block_size
        # One more than the context: a token drawn after a full one is dropped by the scheduler.
        length = max_model_len + 1
        max_blocks = -(-length // block_size)
        self.token_ids = np.zeros((max_num_seqs, length), np.int32)
        self.block_tables = np.zeros((max_num_seqs, max_blocks), np.int32)
        self.num_tokens = np.zeros(max_num_seqs, np.int32)
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int32)
        self.num_computed_tokens = np.zeros(max_num_seqs, np.int32)
        self.num_blocks = np.zeros(max_num_seqs, np.int32)
        self.temperature = np.zeros(max_num_seqs, np.float32)
        self.top_k = np.zeros(max_num_seqs, np.int32)
        self.top_p = np.ones(max_num_seqs, np.float32)
        self.min_p = np.zeros(max_num_seqs, np.float32)
        self.seeds = np.zeros(max_num_seqs, np.int64)
        self.sampling_columns = SamplingColumns(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seeds=self.seeds,
        )
        self.wants_logprobs = np.zeros(max_num_seqs, np.bool_)
        self.wants_prompt_logprobs = np.zeros(max_num_seqs, np.bool_)
        self.logit_params = LogitParamsTable(
            self.token_ids,
            num_prompt_tokens=self.num_prompt_tokens,
            num_tokens=self.num_tokens,
        )
        self.failed: dict[str, str] = {}  # live requests that failed -> message
        self._params: list[SamplingParams | None] = [None] * max_num_seqs
        self._row_of: dict[str, int] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._row_of)

    def apply(self, step: SchedulerOutput) -> None:
        """Applies a step's diffs in the documented order: finished, new, blocks."""
        for request_id in step.finished_request_ids:
            self._remove(request_id)
        for request in step.new_requests:
            self._remove(request.request_id)
            self._add(request)
        for request_id, block_ids in step.new_block_ids.items():
            self._append_blocks(self._row_of[request_id], block_ids)

    def rows(self, request_ids: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """[R] rows of live requests. Raises KeyError for an unknown one."""
        return np.fromiter(map(self._row_of.__getitem__, request_ids), np.int64, len(request_ids))

    def row(self, request_id: str) -> int:
        return self._row_of[request_id]

    def params(self, row: int) -> SamplingParams:
        found = self._params[row]
        assert found is not None
        return found

    def append_tokens(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """One sampled token per row; no row twice."""
        at = np.asarray(rows, np.int64)
        self.token_ids[at, self.num_tokens[at]] = token_ids
        self.num_tokens[at] += 1

    def write_drafts(self, drafts: Mapping[str, Sequence[int]]) -> None:
        """Puts drafts behind their requests' known tokens, where they count for nothing yet."""
        for request_id, token_ids in drafts.items():
            row = self._row_of[request_id]
            start = self.num_tokens[row]
            self.token_ids[row, start : start + len(token_ids)] = token_ids

    def append_run(self, row: int, token_ids: Sequence[int]) -> None:
        """Several tokens that one step yielded; all but the last were computed in it."""
        start = self.num_tokens[row]
        self.token_ids[row, start : start + len(token_ids)] = token_ids
        self.num_tokens[row] = start + len(token_ids)
        self.num_computed_tokens[row] += len(token_ids) - 1

    def _add(self, request: NewRequest) -> None:
        assert self._free_rows, "more live requests than max_num_seqs"
        row = self._free_rows.pop()
        self._row_of[request.request_id] = row
        num_tokens = len(request.token_ids)
        self.token_ids[row, :num_tokens] = request.token_ids
        self.num_tokens[row] = num_tokens
        self.num_prompt_tokens[row] = request.num_prompt_tokens
        self.num_computed_tokens[row] = request.num_computed_tokens
        self.num_blocks[row] = 0
        self._append_blocks(row, request.block_ids)
        params = request.params
        self._params[row] = params
        self.temperature[row] = params.temperature
        self.top_k[row] = min(params.top_k, 2**31 - 1)
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.seeds[row] = ((params.seed + 2**63) % 2**64) - 2**63
        self.wants_logprobs[row] = params.logprobs is not None
        self.wants_prompt_logprobs[row] = params.prompt_logprobs is not None
        self.logit_params.set(row, params)

    def _append_blocks(self, row: int, block_ids: Iterable[int]) -> None:
        new = list(block_ids)
        start = self.num_blocks[row]
        self.block_tables[row, start : start + len(new)] = new
        self.num_blocks[row] = start + len(new)

    def _remove(self, request_id: str) -> None:
        row = self._row_of.pop(request_id, None)
        if row is None:
            return
        self.failed.pop(request_id, None)
        self.logit_params.clear(row)
        self._params[row] = None
        self._free_rows.append(row)
