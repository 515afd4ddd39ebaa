"""Which steps have a captured graph, and when the next is captured. Knows sizes, not what runs.

Serving begins without graphs. Whoever launches steps asks for the graph that fits (`forward_key`,
`sampling_key`), replays it (`replay`) or, given None, does the work itself at its exact size; and
calls `after_launch` once a step, `capture_one` when there is nothing to run.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from octavo.config import SchedulerConfig
from octavo.types import WorkerStats
from octavo.worker.gpu.buffers import StepBuffers, max_samples
from octavo.worker.gpu.lookup import max_drafts_of
from octavo.worker.gpu.runtime import Graph, Runtime
from octavo_kernels.compile_count import num_compiled

# A batch may be padded to a captured graph this many times the size that was made for it.
_MOST_PADDING = 2
# Of the host's time, while steps run: a missing graph that steps ask for, and any other.
_SHARE_WANTED = 0.5
_SHARE_OTHERS = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ForwardKey:
    """Step inputs, embedding, layers and final norm for num_tokens, into ``hidden``."""

    num_tokens: int
    is_decode: bool  # every request has one token, and num_drafts at most
    shares_prefixes: bool = False  # what requests begin with in common is read once
    num_drafts: int = 0

    def num_requests(self, max_num_seqs: int) -> int:
        """The graph's bound on requests; places that a batch leaves unused are padding."""
        return min(self.num_tokens, max_num_seqs)

    @property
    def max_query_len(self) -> int:
        return 1 + self.num_drafts if self.is_decode else self.num_tokens


@dataclass(frozen=True, slots=True)
class SamplingKey:
    """Hidden rows, head, sampling parameters, sampling and appending for num_samples rows."""

    num_samples: int


GraphKey = ForwardKey | SamplingKey
Key = TypeVar("Key", ForwardKey, SamplingKey)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSizes:
    """Sizes that are captured, each ascending; none at all runs everything as it comes."""

    decode: tuple[int, ...] = ()
    mixed: tuple[int, ...] = ()
    sampling: tuple[int, ...] = ()
    max_drafts: int = 0  # of a request
    drafting: tuple[int, ...] = ()  # of steps that verify drafts

    @classmethod
    def configured(cls, config: SchedulerConfig, *, max_num_tokens: int) -> GraphSizes:
        """As the user wants it: none, these, or the default ones."""
        if config.enforce_eager:
            return cls()
        max_drafts = max_drafts_of(config)
        if config.cudagraph_capture_sizes:
            sizes = config.cudagraph_capture_sizes
            return cls.of(sizes, config.max_num_seqs, max_num_tokens, max_drafts=max_drafts)
        return cls.default(
            max_num_seqs=config.max_num_seqs,
            max_num_tokens=max_num_tokens,
            largest=config.max_cudagraph_capture_size,
            max_drafts=max_drafts,
        )

    @classmethod
    def default(
        cls,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        largest: int | None = None,
        max_drafts: int = 0,
    ) -> GraphSizes:
        """Fine where a row more is a large part of the step. ``largest``: of any, default 512."""
        largest = 512 if largest is None else largest
        steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, largest + 1, 32)]
        wanted = [*(s for s in steps if s <= largest), largest]
        return cls.of(wanted, max_num_seqs, max_num_tokens, max_drafts=max_drafts)

    @classmethod
    def of(
        cls, sizes: Sequence[int], max_num_seqs: int, max_num_tokens: int, *, max_drafts: int = 0
    ) -> GraphSizes:
        """The same for every kind, cut to what steps can have."""
        fits = sorted({size for size in sizes if 0 < size <= max_num_tokens})

        def up_to(most: int) -> tuple[int, ...]:
            found = tuple(size for size in fits if size <= most)
            if fits and fits[-1] >= most and most not in found:
                return (*found, most)  # so that a full batch has its graph
            return found

        rows = up_to(min(max_num_seqs, max_num_tokens))
        # A mixed batch has a request of more than one token beside others, or is a short prompt.
        mixed = tuple(s for s in fits if s >= 8)
        if not max_drafts or not fits:
            return cls(decode=rows, mixed=mixed, sampling=rows)
        samples = up_to(min(max_samples(max_num_seqs, max_drafts), max_num_tokens))
        # One request is the case that drafts are for: it is not padded.
        drafting = {1 + max_drafts, *(size for size in samples if size > 1 and _is_coarse(size))}
        return cls(
            decode=rows,
            mixed=mixed,
            sampling=samples,
            max_drafts=max_drafts,
            drafting=tuple(sorted(size for size in drafting if size <= max_num_tokens)),
        )

    @property
    def shared(self) -> tuple[int, ...]:
        """Of decode steps that share prefixes: fewer sizes, since rows are not what they read."""
        return tuple(size for size in self.decode if size > 1 and _is_coarse(size))

    @property
    def depths(self) -> tuple[int, ...]:
        """Bounds on a request's drafts that graphs are captured for, ascending."""
        most = self.max_drafts
        few = (depth for depth in (1, 3, 7, 15, 31) if 4 * depth < 3 * most)
        return (*few, most) if most else ()

    def drafting_of(self, depth: int) -> tuple[int, ...]:
        """Tokens of steps whose requests have so many drafts at most, one of them at least."""
        return tuple(size for size in self.drafting if size > depth)

    def late_keys(self) -> list[ForwardKey]:
        """Captured only if steps ask for them: many never do."""
        shared = [ForwardKey(size, True, True) for size in self.shared]
        drafting = [
            ForwardKey(size, True, num_drafts=depth)
            for depth in self.depths
            for size in self.drafting_of(depth)
        ]
        return [*shared, *drafting]

    def keys(self) -> list[GraphKey]:
        """All of them; what a server needs first comes first."""
        rows: list[GraphKey] = []
        for size in sorted({*self.decode, *self.sampling}):
            rows += [SamplingKey(size)] if size in self.sampling else []
            rows += [ForwardKey(size, True)] if size in self.decode else []
        return [*rows, *(ForwardKey(t, False) for t in self.mixed)]


class StepGraphs:
    """Captured graphs of one engine; for the thread that launches its steps."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        sizes: GraphSizes,
        buffers: StepBuffers,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runtime = runtime
        self._sizes = sizes
        self._buffers = buffers
        self._now = now
        self._graphs: dict[GraphKey, Graph] = {}
        # In the order to be captured, last first: what steps asked for most recently is last.
        self._missing: dict[GraphKey, bool] = dict.fromkeys(reversed(sizes.keys()), False)
        self._unasked: set[GraphKey] = set(sizes.late_keys())
        self._work_of: Callable[[GraphKey], Callable[[], None]] | None = None
        # What was asked for before: there are as many as a step has sizes.
        self._forward_candidates: dict[tuple[int, bool, bool, int], list[ForwardKey]] = {}
        self._sampling_candidates: dict[int, list[SamplingKey]] = {}
        self._next_wanted_at = self._next_other_at = 0.0
        self._num_replayed = self._num_eager = self._num_captured = 0
        self._num_compiled = num_compiled()

    def bind(self, work_of: Callable[[GraphKey], Callable[[], None]]) -> None:
        """``work_of(key)`` does on static buffers what the graph is to do. Call it at start."""
        self._work_of = work_of

    def mark_ready(self) -> None:
        """What was done so far was part of the start, and is not counted."""
        self._num_compiled = num_compiled()
        self.take_stats()

    @property
    def num_missing(self) -> int:
        return len(self._missing)

    def forward_key(
        self,
        *,
        num_tokens: int,
        num_requests: int,
        is_decode: bool,
        shares_prefixes: bool = False,
        num_drafts: int = 0,
    ) -> ForwardKey | None:
        """The captured graph to run these on, padded to its size; None: run them as they are.

        ``num_drafts``: where no request has more than so many tokens behind its first. Requests
        that share prefixes get a graph without that until theirs is captured.
        """
        # With one token each there are as many requests; a mixed graph has room for no more.
        assert num_requests <= num_tokens
        depth = next((d for d in self._sizes.depths if d >= num_drafts), 0) if num_drafts else 0
        is_decode = is_decode or depth > 0
        key = self._captured(self._candidates(num_tokens, is_decode, False, depth))
        if shares_prefixes and is_decode and not depth:
            key = self._captured(self._candidates(num_tokens, True, True)) or key
        if key is None:
            self._num_eager += 1
        else:
            self._num_replayed += 1
        return key

    def sampling_key(self, num_samples: int) -> SamplingKey | None:
        """As `forward_key`, of rows that are sampled without logit parameters or logprobs."""
        candidates = self._sampling_candidates.get(num_samples)
        if candidates is None:
            sizes = _fitting(self._sizes.sampling, num_samples)
            candidates = [SamplingKey(size) for size in sizes]
            self._sampling_candidates[num_samples] = candidates
        return self._captured(candidates)

    def _candidates(
        self, num_tokens: int, is_decode: bool, is_shared: bool, depth: int = 0
    ) -> list[ForwardKey]:
        """Graphs that may serve, nearest first."""
        wanted = num_tokens, is_decode, is_shared, depth
        found = self._forward_candidates.get(wanted)
        if found is None:
            sizes = self._sizes.decode if is_decode else self._sizes.mixed
            if is_shared:
                sizes = self._sizes.shared
            elif depth:
                sizes = self._sizes.drafting_of(depth)
            fitting = _fitting(sizes, num_tokens)
            found = [ForwardKey(size, is_decode, is_shared, depth) for size in fitting]
            self._forward_candidates[wanted] = found
        return found

    def replay(self, key: GraphKey) -> None:
        """Launches the graph that `forward_key` or `sampling_key` named."""
        self._graphs[key].replay()

    def after_launch(self) -> bool:
        """Captures a graph if its turn has come; whether it did.

        To be called when the device has work to do meanwhile. The host's time is the measure: a
        capture takes as long as launching its step kernel by kernel, twice.
        """
        if not self._missing:
            return False
        is_wanted = next(reversed(self._missing.values()))
        if self._now() < (self._next_wanted_at if is_wanted else self._next_other_at):
            return False
        return self.capture_one()

    def capture_one(self) -> bool:
        """Captures the next missing graph; False if there is none. One that fails, and raises, is
        the last to be tried."""
        if not self._missing or self._work_of is None:
            return False
        began = self._now()
        key, _ = self._missing.popitem()
        # Once outside the capture: whatever is made at first use, is made.
        work = self.run_blank(key)
        try:
            self._graphs[key] = self._runtime.capture(work)
        except Exception:
            # It leaves torch's allocator in a capture that never ends: no other can follow.
            self._missing.clear()
            self._unasked.clear()
            raise
        self._num_captured += 1
        ended = self._now()
        took = ended - began
        self._next_wanted_at = ended + took * (1 / _SHARE_WANTED - 1)
        self._next_other_at = ended + took * (1 / _SHARE_OTHERS - 1)
        if not self._missing:
            _log.info("all %d graphs of steps are captured", len(self._graphs))
        return True

    def run_blank(self, key: GraphKey) -> Callable[[], None]:
        """Launches the work of ``key``, which need not be a graph's, on a batch of padding alone;
        returns the work."""
        assert self._work_of is not None, "bind comes first"
        self._buffers.blank_batch()
        work = self._work_of(key)
        work()
        return work

    def take_stats(self) -> WorkerStats:
        """What happened since the last call."""
        before, self._num_compiled = self._num_compiled, num_compiled()
        stats = WorkerStats(
            graph_steps=self._num_replayed,
            eager_steps=self._num_eager,
            graphs_captured=self._num_captured,
            kernel_compiles=self._num_compiled - before,
        )
        self._num_replayed = self._num_eager = self._num_captured = 0
        return stats

    def _captured(self, candidates: Sequence[Key]) -> Key | None:
        """The first that has a graph. Only the nearest is what this step would have wanted."""
        wanted = candidates[0] if candidates else None
        if wanted is not None and (wanted in self._missing or wanted in self._unasked):
            self._unasked.discard(wanted)
            self._missing.pop(wanted, None)
            self._missing[wanted] = True
        return next((key for key in candidates if key in self._graphs), None)


def _is_coarse(size: int) -> bool:
    """Whether it is a power of two, or one and a half."""
    return size // (size & -size) in (1, 3)


def _fitting(sizes: tuple[int, ...], wanted: int) -> tuple[int, ...]:
    """Sizes that may serve, nearest first."""
    first = bisect.bisect_left(sizes, wanted)
    if first == len(sizes):
        return ()
    return sizes[first : bisect.bisect_right(sizes, _MOST_PADDING * sizes[first])]
