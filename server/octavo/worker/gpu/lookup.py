"""Speculation as a GPU has it: which methods, and drafts that rows of tokens are asked for on the
device. Knows the table's columns, no request and no policy.
"""

from __future__ import annotations

from octavo.config import SchedulerConfig, SpeculativeConfig
from octavo.worker.gpu.arena import RequestArena
from octavo.worker.gpu.buffers import StepBuffers
from octavo_kernels.drafting.gpu import propose

METHODS = ("ngram", "auto", "off")
# `auto`: with the token before them eight rows, which cost about what one does.
_AUTO_DRAFTS = 7


def speculation_of(config: SchedulerConfig) -> SpeculativeConfig:
    """What is configured, off by default. Raises ValueError for a method that no GPU has."""
    text = config.speculative_config
    found = SpeculativeConfig.from_json(text or '{"method": "off"}')
    if found.method not in METHODS:
        raise ValueError(
            f"speculative_config on a GPU must have a method of {', '.join(METHODS)} so far, "
            f"got {text}"
        )
    if found.model is not None:
        raise ValueError(f"speculative_config on a GPU can have no model so far, got {text}")
    return found


def max_drafts_of(config: SchedulerConfig) -> int:
    """Drafts that a request may have in a step; 0 = no speculation."""
    found = speculation_of(config)
    if found.method == "off":
        return 0
    most = found.num_speculative_tokens
    return min(most, _AUTO_DRAFTS) if found.method == "auto" else most


class PromptLookup:
    """Drafts from what followed a row's last tokens before, and the lengths that hang on them."""

    def __init__(self, arena: RequestArena, *, min_length: int, max_length: int) -> None:
        self._token_table = arena.view("token_ids")
        self._num_tokens = arena.view("num_tokens")
        self._min_length = min_length
        self._max_length = max_length

    def launch(self, buffers: StepBuffers, *, num_requests: int, num_tokens: int) -> None:
        """For the batch of so many requests and tokens that was uploaded; fixed addresses only."""
        batch = buffers.batch
        num_samples = min(num_tokens, buffers.sizes.max_samples)
        propose(
            batch.rows[:num_requests],
            batch.seq_lens[:num_requests],
            sample_rows=batch.sample_rows[:num_samples],
            sample_positions=batch.sample_positions[:num_samples],
            token_table=self._token_table,
            num_tokens=self._num_tokens,
            num_found=buffers.found.num_found[:num_requests],
            min_length=self._min_length,
            max_length=self._max_length,
        )
