"""Forward passes as recorded kernel launches, one recording for each number of tokens. CPU only.

Knows the model as something that launches kernels; knows no scheduler, sampler or request.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from octavo.attention.base import AttentionMetadata, KVLayer
from octavo.models.base import Model
from octavo.worker.input_batch import InputBatch, StepBuffers
from octavo_kernels.recording import Arena, Recording, UnrecordableError, recording

# Of launches and their arguments: about 50 KB for 30 layers and one number of tokens.
_MAX_BYTES = 64 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """A forward pass that can be run again, and where its results will lie."""

    launches: Recording
    attn: AttentionMetadata
    hidden: Tensor


class ForwardReplays:
    """Runs a model's forward pass, after the second time for a number of tokens in one native call.

    The first time costs what a step costs, so a number of tokens that comes once is not recorded.
    A replay gives the same bits: it launches the same kernels.
    """

    def __init__(self, model: Model, *, kv_caches: Sequence[KVLayer], buffers: StepBuffers) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._buffers = buffers
        self._arena = Arena()
        self._passes: OrderedDict[int, _Pass] = OrderedDict()  # the least recently used first
        self._num_bytes = 0
        self._seen: set[int] = set()
        self._is_able = True

    @property
    def num_recorded(self) -> int:
        """Numbers of tokens that are replayed."""
        return len(self._passes)

    def forward(self, batch: InputBatch) -> Tensor:
        """Hidden states [T, D] of a batch that lies in the buffers; valid until the next call.

        Raises ValueError for what kernels find wrong with the batch, and what the model raises.
        """
        num_tokens = len(batch.token_ids)
        found = self._passes.get(num_tokens)
        if found is not None:
            self._passes.move_to_end(num_tokens)
            found.launches.replay()
            found.attn.check()
            return found.hidden
        if num_tokens in self._seen and self._is_able:
            try:
                return self._record(num_tokens)
            except UnrecordableError as error:
                self._is_able = False
                _log.warning("steps are not replayed, which costs time: %s", error)
        self._seen.add(num_tokens)
        hidden = self._model.forward(batch.token_ids, batch.attn, self._kv_caches)
        batch.attn.check()
        return hidden

    def _record(self, num_tokens: int) -> Tensor:
        token_ids, attn = self._buffers.of_any_batch(num_tokens)
        with recording(self._arena) as launches:
            hidden = self._model.forward(token_ids, attn, self._kv_caches)
        attn.check()
        self._passes[num_tokens] = _Pass(launches=launches, attn=attn, hidden=hidden)
        self._num_bytes += launches.num_bytes
        while self._num_bytes > _MAX_BYTES and len(self._passes) > 1:
            _, oldest = self._passes.popitem(last=False)
            self._num_bytes -= oldest.launches.num_bytes
        return hidden
