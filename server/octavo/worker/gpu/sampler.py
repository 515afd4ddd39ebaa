"""Draws tokens on a GPU by parameters that live there. Knows rows of the table, not requests' ids.

A step whose samples are plain is drawn by `launch_plain`, which a graph may hold; any other by
`launch`: the same kernels, with those for logit parameters and log-probabilities between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.models.base import Model
from octavo.sampling.penalties import has_penalty
from octavo.sampling.sampler import NON_FINITE_MESSAGE, STATUS_MESSAGES, Sampled
from octavo.sampling.token_lists import NO_LISTS, TokenLists
from octavo.types import SamplingParams, TokenLogprobs
from octavo.worker.gpu.arena import RequestArena
from octavo.worker.gpu.buffers import Results, StepBuffers, StepSizes
from octavo.worker.gpu.landing import Landings
from octavo.worker.gpu.logit_lists import LogitLists
from octavo.worker.gpu.runtime import Runtime
from octavo.worker.gpu.scores import PendingScores, launch_scores, read_scores
from octavo.worker.gpu.upload import Upload
from octavo_kernels.drafting.gpu import accept
from octavo_kernels.sampling import OK, LogitParams
from octavo_kernels.sampling.gpu import GpuWorkspace, sample
from octavo_kernels.sampling.gpu_params import (
    GpuLogitParams,
    apply_logit_params,
    extend,
    load_slots,
)
from octavo_kernels.step_inputs.gpu import SamplingColumns, gather_rows, gather_sampling

Rows = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]

_TABLE = ("temperature", "top_k", "top_p", "min_p", "seeds")
_COUNTED = ("token_ids", "num_prompt_tokens", "num_tokens")
_PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty", "min_tokens")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StagedSamples:
    """What `launch` needs of a step's S samples, staged before the step's words are sent."""

    num_samples: int
    edited: Tensor | None  # [L] int32: samples whose logits parameters change; None: no such
    edited_rows: Tensor | None  # [L] int32: their rows
    edited_depths: Tensor | None  # [L] int32: drafts before them; None: before no sample
    fresh_rows: Tensor | None  # [F] int32: those of them whose tokens were never counted
    fresh: Rows  # the same, on the host
    asking: Tensor | None  # [A] int32: samples that want log-probabilities; None: no such
    askers: Sequence[int]  # the same, on the host
    num_best: Sequence[int]  # alternatives for each asker


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleScores:
    """Log-probabilities of a step's samples, pending."""

    askers: Sequence[int]
    scores: PendingScores


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PendingSamples:
    """Results of one step's samples on their way to the host, to be read once."""

    num_samples: int
    results: Tensor  # words of the host, as `StepBuffers.results`
    scores: SampleScores | None


class _Landed(NamedTuple):
    """`Results` on the host."""

    tokens: Rows
    status: Ints
    num_drawn: Ints
    num_found: Ints


class GpuSampler:
    """Row-wise: what one row draws does not depend on the others or on their number.

    Counts of each row's tokens are kept beside the arena, which holds every other parameter; the
    drawn token is appended to the arena's ``token_ids``, where the next step finds it.
    """

    def __init__(
        self, arena: RequestArena, *, sizes: StepSizes, runtime: Runtime, max_logprobs: int
    ) -> None:
        num_rows, vocab_size = arena.num_rows, sizes.vocab_size
        device = runtime.device
        self._sizes = sizes
        self._max_logprobs = max_logprobs
        self._landings = Landings(runtime)
        self._table = {name: arena.view(name) for name in _TABLE}
        num_samples = sizes.max_samples
        self._columns = SamplingColumns.create(num_samples, device=device)
        self._workspace = GpuWorkspace.create(
            num_samples, vocab_size=vocab_size, dtype=torch.float32, device=device
        )
        shape = (num_samples, sizes.hidden_size)
        self._hidden = torch.zeros(shape, dtype=sizes.dtype, device=device)  # after which to draw
        self._raw = torch.zeros(num_samples, vocab_size, device=device)
        self._lists = LogitLists(num_rows=num_rows, runtime=runtime)
        words = -(-vocab_size // 32)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._params = GpuLogitParams(
            vocab_size=vocab_size,
            lists=LogitParams(
                **{name: arena.view(name) for name in (*_COUNTED, *_PENALTIES)},
                **self._lists.columns(),
            ),
            counts=ints(num_rows, vocab_size),
            allowed=ints(num_rows, words),
            grammar=ints(num_rows, words),
            has_grammar=ints(num_rows),
        )
        self._is_edited = np.zeros(num_rows, np.bool_)
        self._is_counted = np.zeros(num_rows, np.bool_)
        self._num_best = np.full(num_rows, -1, np.int32)  # negative: no log-probabilities wanted
        self._special_rows: set[int] = set()  # edited, or with log-probabilities wanted
        # Results in host memory that they were brought to, by its address, which it keeps as long
        # as it is in here.
        self._landed: dict[int, _Landed] = {}

    def set_row(self, row: int, params: SamplingParams, upload: Upload) -> None:
        """Takes over the parameters of the request that now has the row, whose tokens go to the
        arena with the same upload."""
        assert params.logprobs is None or params.logprobs <= self._max_logprobs
        lists = TokenLists.of(params)
        is_edited = has_penalty(params) or lists is not NO_LISTS
        upload.put("temperature", row, params.temperature)
        upload.put("top_k", row, min(params.top_k, 2**31 - 1))
        upload.put("top_p", row, params.top_p)
        upload.put("min_p", row, params.min_p)
        upload.put("seeds", row, ((params.seed + 2**63) % 2**64) - 2**63)
        if is_edited:  # of another row they are not read
            for name in _PENALTIES:
                upload.put(name, row, getattr(params, name))
        self._lists.set(row, lists)
        self._is_edited[row] = is_edited
        self._is_counted[row] = False
        self._num_best[row] = -1 if params.logprobs is None else params.logprobs
        if is_edited or params.logprobs is not None:
            self._special_rows.add(row)
        else:
            self._special_rows.discard(row)

    def clear_row(self, row: int) -> None:
        """Forgets the row's request."""
        self._lists.set(row, NO_LISTS)
        self._is_edited[row] = False
        self._num_best[row] = -1
        self._special_rows.discard(row)

    def is_plain(self, rows: Rows) -> bool:
        """Whether no row has parameters that change logits or wants log-probabilities."""
        if not self._special_rows:
            return True
        return not (self._is_edited[rows].any() or (self._num_best[rows] >= 0).any())

    def stage(self, rows: Rows, upload: Upload, depths: Ints | None = None) -> StagedSamples:
        """Stages what `launch` will read for samples of these rows [S]; before `upload.send`.

        ``depths``: [S] drafts before each sample; None: before none.
        """

        def section(values: npt.NDArray[np.integer]) -> Tensor | None:
            return upload.section(values.astype(np.int32)) if len(values) else None

        edited = np.flatnonzero(self._is_edited[rows])
        asking = np.flatnonzero(self._num_best[rows] >= 0)
        edited_rows = rows[edited]
        heads = edited_rows if depths is None else edited_rows[depths[edited] == 0]
        fresh = heads[~self._is_counted[heads]]
        return StagedSamples(
            num_samples=len(rows),
            edited=section(edited),
            edited_rows=section(edited_rows),
            edited_depths=None if depths is None else section(depths[edited]),
            fresh_rows=section(fresh),
            fresh=fresh,
            asking=section(asking),
            askers=asking.tolist(),
            num_best=self._num_best[rows[asking]].tolist(),
        )

    def launch_plain(self, model: Model, buffers: StepBuffers, num_samples: int) -> None:
        """Draws after the first samples of the batch, into ``sampled`` and ``status``.

        Reads and writes fixed addresses only, whatever the batch. Places of padding draw
        something that is appended nowhere.
        """
        self._compute_logits(model, buffers, num_samples)
        self._draw(buffers, num_samples)

    def launch(
        self, model: Model, buffers: StepBuffers, staged: StagedSamples
    ) -> SampleScores | None:
        """`launch_plain` with parameters that change logits; scores of those who want them."""
        self._compute_logits(model, buffers, staged.num_samples)
        logits = buffers.logits[: staged.num_samples]
        raw, askers = logits, staged.askers
        if staged.asking is not None and (staged.edited is not None or len(askers) < len(logits)):
            raw = torch.index_select(logits, 0, staged.asking, out=self._raw[: len(askers)])
        if staged.edited is not None:
            self._edit(logits, staged)
        self._draw(buffers, staged.num_samples)
        if staged.asking is None:
            return None
        scores = launch_scores(
            raw,
            chosen=buffers.sampled.index_select(0, staged.asking),
            num_best=staged.num_best,
            landings=self._landings,
        )
        return SampleScores(askers=askers, scores=scores)

    def fetch(
        self, buffers: StepBuffers, num_samples: int, scores: SampleScores | None
    ) -> PendingSamples:
        """Launches the way to the host of what was drawn."""
        results = self._landings.fetch(buffers.results)
        return PendingSamples(num_samples=num_samples, results=results, scores=scores)

    def read(self, pending: PendingSamples) -> Sampled:
        """A step's results; its work has come to its end before. Tokens of failed rows are -1."""
        tokens, status = self._landed_at(pending.results)[:2]
        token_ids: list[int] = tokens[: pending.num_samples].tolist()
        codes = status[: pending.num_samples]
        errors = {
            row: STATUS_MESSAGES[int(codes[row])] for row in (codes != OK).nonzero()[0].tolist()
        }
        self._landings.give_back(pending.results)
        logprobs: dict[int, TokenLogprobs] = {}
        if pending.scores is not None:
            found = read_scores(pending.scores.scores, self._landings)
            for row, score in zip(pending.scores.askers, found, strict=True):
                if score is None:
                    errors[row] = NON_FINITE_MESSAGE
                elif row not in errors:
                    logprobs[row] = score
        return Sampled(token_ids=token_ids, errors=errors, logprobs=logprobs)

    def drafted(self, pending: PendingSamples, num_requests: int) -> tuple[Ints, Ints]:
        """With speculation, to be asked before `read`. [S] tokens that a request got, at the first
        of its samples (0 where that could not be drawn); [R] drafts that were looked up."""
        landed = self._landed_at(pending.results)
        num_drawn = landed.num_drawn[: pending.num_samples]
        return num_drawn.copy(), landed.num_found[:num_requests].copy()

    def _landed_at(self, results: Tensor) -> _Landed:
        address = results.data_ptr()
        if address not in self._landed:
            parts = Results.of(results, sizes=self._sizes)
            self._landed[address] = _Landed(*(part.numpy() for part in parts))
        return self._landed[address]

    def _compute_logits(self, model: Model, buffers: StepBuffers, num_samples: int) -> None:
        hidden = self._hidden[:num_samples]
        gather_rows(buffers.hidden, buffers.batch.sample_tokens[:num_samples], out=hidden)
        model.compute_logits(hidden, out=buffers.logits[:num_samples])

    def _edit(self, logits: Tensor, staged: StagedSamples) -> None:
        """Changes the logits of rows that have parameters which do that."""
        assert staged.edited is not None and staged.edited_rows is not None
        lists = replace(self._params.lists, **self._lists.columns())
        params = replace(self._params, lists=lists)
        if staged.fresh_rows is not None:
            load_slots(params, staged.fresh_rows)
            self._is_counted[staged.fresh] = True
        apply_logit_params(
            logits,
            params=params,
            rows=staged.edited,
            slots=staged.edited_rows,
            num_drafts=staged.edited_depths,
        )

    def _draw(self, buffers: StepBuffers, num_samples: int) -> None:
        """Draws from the logits of the first samples and appends to their rows: of a row's several
        samples as many as agree with its drafts, and one."""
        rows = buffers.batch.sample_rows[:num_samples]
        columns = self._columns.first(num_samples)
        positions = buffers.batch.sample_positions[:num_samples]
        gather_sampling(rows, **self._table, positions=positions, out=columns)
        tokens = buffers.sampled[:num_samples]
        sample(
            buffers.logits[:num_samples],
            **columns.arguments(),
            workspace=self._workspace,
            out=(tokens, buffers.status[:num_samples]),
        )
        if not self._sizes.max_drafts:
            extend(self._params, slots=rows, tokens=tokens)
            return
        accept(
            rows,
            tokens,
            token_table=self._params.lists.token_ids,
            num_tokens=self._params.lists.num_tokens,
            counts=self._params.counts,
            num_drawn=buffers.found.num_drawn[:num_samples],
            max_drafts=self._sizes.max_drafts,
        )
