"""Speculation: guesses at a request's next tokens, which one step then verifies all at once."""

from __future__ import annotations

import time
from collections.abc import Callable

from octavo.config import SpeculativeConfig
from octavo.speculative.base import Drafter, NoDrafts, Outlook
from octavo.speculative.controller import (
    MAX_REQUESTS,
    AutoDrafter,
    FixedDrafter,
    FixedModelDrafter,
)
from octavo.speculative.ngram import NgramProposer
from octavo.speculative.proposer import BatchProposer, Drafted, GoesOn, Proposal
from octavo.speculative.sources import DraftCounts
from octavo.speculative.suffix import SuffixProposer

__all__ = [
    "MAX_REQUESTS",
    "BatchProposer",
    "DraftCounts",
    "Drafted",
    "Drafter",
    "GoesOn",
    "NoDrafts",
    "Outlook",
    "Proposal",
    "make_drafter",
]

# `auto` weighs chances itself: it is shown drafts that a fixed method would not try.
_AUTO_SPEC_FACTOR, _AUTO_MIN_PROB = 4.0, 0.05


def make_drafter(
    config: SpeculativeConfig,
    *,
    model: BatchProposer | None = None,
    most_requests: int = MAX_REQUESTS,
    seconds: Callable[[], float] = time.perf_counter,
) -> NoDrafts | FixedDrafter | FixedModelDrafter | AutoDrafter:
    """What drafts for a worker. ``model``: what was made of ``config.model``, which ``auto`` asks
    in steps of at most so many requests; ``seconds``: the worker's clock."""
    most = config.num_speculative_tokens
    if config.method == "off":
        return NoDrafts()
    if config.method in ("eagle3", "draft_model"):
        assert model is not None, "a method that drafts by a model"
        return FixedModelDrafter(model, num_drafts=most, seconds=seconds)
    if config.method == "ngram":
        ngram = NgramProposer(
            min_length=config.prompt_lookup_min, max_length=config.prompt_lookup_max
        )
        return FixedDrafter(ngram, num_drafts=most, seconds=seconds)
    is_auto = config.method == "auto"
    suffix = SuffixProposer(
        max_tokens=config.suffix_decoding_max_cached_tokens,
        spec_factor=_AUTO_SPEC_FACTOR if is_auto else config.suffix_decoding_max_spec_factor,
        min_token_prob=_AUTO_MIN_PROB if is_auto else config.suffix_decoding_min_token_prob,
    )
    if is_auto:
        return AutoDrafter(
            suffix,
            max_drafts=most,
            model=model,
            most_requests_of_model=most_requests,
            seconds=seconds,
        )
    return FixedDrafter(suffix, num_drafts=most, seconds=seconds)
