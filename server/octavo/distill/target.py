"""The target as a teacher: its hidden states over given texts. Knows the model, no head, no loss.

It is the model that `octavo serve` would run under the same options, weights quantised or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.attention.base import AttentionMetadata, KVLayer
from octavo.checkpoint import resolve
from octavo.config import EngineConfig
from octavo.models import Model, Taps, kv_cache_spec, load_model, weight_dtype
from octavo.platforms.gpu import GPUPlatform
from octavo.worker import startup
from octavo.worker.devices import DeviceKind, choose_device
from octavo.worker.gpu import startup as gpu_startup

_MAX_TOKENS = 1024  # of texts that go through the model together
_BLOCK_SIZE = 16
_LOGITS_ROWS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What the target computed over the n tokens of one text, from place ``first`` on."""

    taps: Tensor  # [n - first, 3H] float32
    hidden: Tensor  # [n - labelled, H] float32 after the final norm, of the last places
    log_norm: Tensor  # [n - labelled] log of the softmax's denominator over the vocabulary


def load_target(config: EngineConfig) -> tuple[str, Model, torch.dtype]:
    """The model with its name, and the dtype of its cache. Raises ValueError."""
    kind = choose_device(config.model.device)
    files = resolve(config.model)
    if kind is not DeviceKind.CPU:
        device = gpu_startup.start_device(is_interpreted=kind is DeviceKind.INTERPRETED)
        dtype = weight_dtype(config.model.dtype, device="cuda")
        model = load_model(
            files,
            files.spec,
            platform=GPUPlatform(device.runtime.device),
            dtype=dtype,
            seed=config.model.seed % 2**63,
            max_model_len=config.model.max_model_len,
        )
        return files.name, model, dtype
    startup.set_threads(config.model.num_threads)
    precision = startup.choose_precision(config, files=files)
    with startup.kernels_compiled(precision):
        model, _ = startup.load(config, files=files, spec=files.spec, precision=precision)
    return files.name, model, precision.cache_dtype


class Target:
    """Runs texts through the model and keeps what a head learns from."""

    def __init__(
        self,
        model: Model,
        *,
        cache_dtype: torch.dtype,
        layers: tuple[int, ...],
        max_len: int,
        label_temperature: float = 1.0,
    ) -> None:
        self.model = model
        self.device = model.platform.device
        self._temperature = label_temperature
        self.layers = layers
        self._max_tokens = max(_MAX_TOKENS, max_len)
        spec = kv_cache_spec(model.spec, block_size=_BLOCK_SIZE, dtype=cache_dtype)
        # Each text begins a block: at worst all but one token of a block are wasted.
        self._num_blocks = 2 * -(-self._max_tokens // _BLOCK_SIZE)
        self._caches: list[KVLayer] = model.backend.allocate(spec, num_blocks=self._num_blocks)

    @torch.no_grad()
    def read(self, texts: Sequence[tuple[Sequence[int], int, int]]) -> list[Read]:
        """States of texts (token ids, first place of taps, first place of labels)."""
        found: list[Read] = []
        for group in self._groups(texts):
            found += self._read(group)
        return found

    def _groups(
        self, texts: Sequence[tuple[Sequence[int], int, int]]
    ) -> Iterator[list[tuple[Sequence[int], int, int]]]:
        group: list[tuple[Sequence[int], int, int]] = []
        tokens = blocks = 0
        for text in texts:
            length, needed = len(text[0]), -(-len(text[0]) // _BLOCK_SIZE)
            assert length <= self._max_tokens, "a text is longer than the cache"
            if group and (tokens + length > self._max_tokens or blocks + needed > self._num_blocks):
                yield group
                group, tokens, blocks = [], 0, 0
            group.append(text)
            tokens, blocks = tokens + length, blocks + needed
        if group:
            yield group

    def _read(self, group: Sequence[tuple[Sequence[int], int, int]]) -> list[Read]:
        lengths = [len(ids) for ids, _, _ in group]
        num_tokens = sum(lengths)
        size = self.model.spec.hidden_size
        out = torch.empty(num_tokens, len(self.layers) * size, device=self.device)
        taps = Taps(layers=self.layers, out=out)
        flat = torch.tensor([i for ids, _, _ in group for i in ids], dtype=torch.int32)
        token_ids = flat.to(self.device)
        attn = self._metadata(lengths)
        hidden = self.model.forward(token_ids, attn, self._caches, taps=taps)
        attn.check()
        starts = [sum(lengths[:i]) for i in range(len(group))]
        # Copies: what the model returns is valid until its next pass alone.
        labelled = [
            hidden[start + label : start + length].clone()
            for start, length, (_, _, label) in zip(starts, lengths, group, strict=True)
        ]
        norms = torch.split(self._log_norms(torch.cat(labelled)), [len(rows) for rows in labelled])
        return [
            Read(taps=out[start + first : start + length], hidden=rows.float(), log_norm=norm)
            for start, length, (_, first, _), rows, norm in zip(
                starts, lengths, group, labelled, norms, strict=True
            )
        ]

    def _metadata(self, lengths: Sequence[int]) -> AttentionMetadata:
        needed = [-(-length // _BLOCK_SIZE) for length in lengths]
        tables = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
        slots, positions, first = [], [], 0
        for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
            tables[row, :count] = torch.arange(first, first + count, dtype=torch.int32)
            positions.append(torch.arange(length, dtype=torch.int32))
            slots.append(positions[-1] + first * _BLOCK_SIZE)
            first += count
        ends = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return AttentionMetadata(
            positions=torch.cat(positions).to(self.device),
            slots=torch.cat(slots).to(self.device),
            block_tables=tables.to(self.device),
            query_start_loc=torch.cat([torch.zeros(1, dtype=torch.int32), ends]).to(self.device),
            seq_lens=torch.tensor(lengths, dtype=torch.int32).to(self.device),
        )

    def _log_norms(self, hidden: Tensor) -> Tensor:
        """[M, H] -> [M]: logsumexp of the logits at the labels' temperature."""
        parts = [
            (self.model.compute_logits(rows) / self._temperature).logsumexp(-1)
            for rows in torch.split(hidden, _LOGITS_ROWS)
        ]
        return torch.cat(parts) if parts else hidden.new_zeros(0)

    @torch.no_grad()
    def token_vectors(self) -> Tensor:
        """[V, H] float32: what the model's first layer gets of every token."""
        ids = torch.arange(self.model.spec.vocab_size, dtype=torch.int32, device=self.device)
        return torch.cat(
            [self.model.embed(part).to(torch.float32, copy=True) for part in torch.split(ids, 4096)]
        )

    @torch.no_grad()
    def output_rows(self, token_ids: Tensor) -> Tensor:
        """[n, H] float32: the output matrix's rows of these tokens.

        Read as the logits of unit vectors, which every model can give, however it keeps the matrix.
        """
        dtype = self.model.embed(torch.zeros(1, dtype=torch.int32, device=self.device)).dtype
        unit = torch.eye(self.model.spec.hidden_size, dtype=dtype, device=self.device)
        parts = [self.model.compute_logits(part)[:, token_ids] for part in torch.split(unit, 64)]
        return torch.cat(parts).T.contiguous()
