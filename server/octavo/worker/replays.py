"""Forward passes as recorded kernel launches, one recording for each number of tokens. CPU only.

Knows the model as something that launches kernels; knows no scheduler, sampler or request.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from octavo.attention.base import AttentionMetadata, KVLayer
from octavo.models.base import Pass
from octavo.worker.input_batch import InputBatch, StepBuffers
from octavo_kernels.recording import Arena, Recording, UnrecordableError, recording

# Of launches and their arguments: about 50 KB for 30 layers and one number of tokens.
_MAX_BYTES = 64 << 20
# Of logits that exist at a time: 25 MB for a vocabulary of 49k.
MAX_LOGITS_ROWS = 128
# What is recorded in idle time: passes of so many tokens (in a longer one Python's share is small)
# while recordings take no more than this.
_MAX_IDLE_TOKENS = 512
_MAX_IDLE_BYTES = _MAX_BYTES // 2
_log = logging.getLogger(__name__)

_Kind = tuple[int, bool]  # number of tokens; whether each has logits


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """A forward pass that can be run again, and where its results will lie."""

    launches: Recording
    attn: AttentionMetadata
    hidden: Tensor
    logits: Tensor | None


class ForwardReplays:
    """Runs a model's forward pass, from the second time for a number of tokens in one native call.

    To record takes Python longer than to run, so a number of tokens that comes once is recorded
    only if there is idle time. A replay gives the same bits: it launches the same kernels. Where
    every token is one to draw after, as in most steps, logits are part of the pass.
    """

    def __init__(self, model: Pass, *, kv_caches: Sequence[KVLayer], buffers: StepBuffers) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._buffers = buffers
        self._arena = Arena()
        self._passes: OrderedDict[_Kind, _Pass] = OrderedDict()  # the least recently used first
        self._num_bytes = 0
        self._seen: set[_Kind] = set()
        self._idle_kinds = _idle_kinds(buffers.max_num_tokens)
        self._is_able = True

    @property
    def num_recorded(self) -> int:
        """Kinds of passes that are replayed."""
        return len(self._passes)

    def forward(self, batch: InputBatch) -> tuple[Tensor, Tensor | None]:
        """Hidden states [T, D] of a batch that lies in the buffers; valid until the next call.

        With them logits [T, V] where each of few tokens is one to draw after, else None. Raises
        ValueError for what kernels find wrong with the batch, and what the model raises.
        """
        has_logits = batch.num_tokens == len(batch.samples) <= MAX_LOGITS_ROWS
        found = self.replay(batch.num_tokens, has_logits=has_logits)
        if found is not None:
            return found
        return self.run(batch.token_ids, batch.attn, has_logits=has_logits)

    def run(
        self, token_ids: Tensor, attn: AttentionMetadata, *, has_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The same of tokens and metadata that lie in the buffers."""
        kind = len(token_ids), has_logits
        found = self.replay(len(token_ids), has_logits=has_logits)
        if found is not None:
            return found
        if kind in self._seen and self._record(kind):
            found = self.replay(len(token_ids), has_logits=has_logits)
            assert found is not None
            return found
        self._seen.add(kind)
        hidden, logits = self._pass(token_ids, attn, has_logits=has_logits)
        attn.check()
        return hidden, logits

    def record_one(self) -> bool:
        """Records one more pass that is likely to come; False if none is left."""
        for kind in self._idle_kinds:
            if not self._is_able or self._num_bytes > _MAX_IDLE_BYTES:
                break
            if kind not in self._passes:
                return self._record(kind)
        return False

    def replay(self, num_tokens: int, *, has_logits: bool) -> tuple[Tensor, Tensor | None] | None:
        """The same of a batch that lies in the buffers; None where no such pass is recorded."""
        kind = num_tokens, has_logits
        found = self._passes.get(kind)
        if found is None:
            return None
        self._passes.move_to_end(kind)
        found.launches.replay()
        found.attn.check()
        return found.hidden, found.logits

    def _pass(
        self, token_ids: Tensor, attn: AttentionMetadata, *, has_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        hidden = self._model.forward(token_ids, attn, self._kv_caches)
        return hidden, self._model.compute_logits(hidden) if has_logits else None

    def _record(self, kind: _Kind) -> bool:
        """Whether the pass can be replayed from now on."""
        if not self._is_able:
            return False
        token_ids, attn = self._buffers.of_any_batch(kind[0])
        try:
            with recording(self._arena) as launches:
                hidden, logits = self._pass(token_ids, attn, has_logits=kind[1])
        except UnrecordableError as error:
            self._is_able = False
            _log.warning("steps are not replayed, which costs time: %s", error)
            return False
        self._passes[kind] = _Pass(launches=launches, attn=attn, hidden=hidden, logits=logits)
        self._num_bytes += launches.num_bytes
        while self._num_bytes > _MAX_BYTES and len(self._passes) > 1:
            _, oldest = self._passes.popitem(last=False)
            self._num_bytes -= oldest.launches.num_bytes
        return True


def _idle_kinds(max_num_tokens: int) -> Iterator[_Kind]:
    """Steps that only draw tokens, then those that read prompts besides, the longest first.

    Each is told once: one that was recorded and dropped is not worth it.
    """
    for num_tokens in range(1, min(max_num_tokens, MAX_LOGITS_ROWS) + 1):
        yield num_tokens, True
    for num_tokens in range(min(max_num_tokens, _MAX_IDLE_TOKENS), 0, -1):
        yield num_tokens, False
