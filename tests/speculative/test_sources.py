"""Proposers that raise or dawdle cost their request its drafts, and nobody anything else."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pytest

from octavo.config import SpeculativeConfig
from octavo.speculative import make_drafter
from octavo.speculative.base import NoDrafts, Outlook
from octavo.speculative.controller import AutoDrafter, FixedDrafter
from octavo.speculative.proposer import Proposal, TokenIds
from octavo.speculative.sources import DraftCounts, GuardedProposer
from octavo.types import NewRequest, SamplingParams, SchedulerOutput
from tests.speculative.simulated import VirtualSeconds

KNOWN = np.asarray([1, 2, 3], np.int32)


class Troubled:
    """`Proposer` that fails where it is told to."""

    def __init__(self, seconds: VirtualSeconds) -> None:
        self.seconds = seconds
        self.raises: dict[str, str] = {}  # request -> in which call
        self.takes: dict[str, float] = {}
        self.live: set[str] = set()

    def _call(self, name: str, request_id: str) -> None:
        if self.raises.get(request_id) == name:
            raise RuntimeError(f"{name} of {request_id}")

    def begin(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        num_prompt_tokens: int,
        salt: str | None,
    ) -> None:
        self._call("begin", request_id)
        self.live.add(request_id)

    def extend(self, request_id: str, token_ids: Sequence[int]) -> None:
        assert request_id in self.live
        self._call("extend", request_id)

    def end(self, request_id: str) -> None:
        self.live.discard(request_id)
        self._call("end", request_id)

    def propose(self, request_id: str, token_ids: TokenIds, *, max_drafts: int) -> Proposal:
        assert request_id in self.live
        self.seconds.now += self.takes.get(request_id, 1e-5)
        self._call("propose", request_id)
        return Proposal([7, 8, 9], [0.9, 0.8, 0.7])


def step(*names: str, finished: tuple[str, ...] = ()) -> SchedulerOutput:
    return SchedulerOutput(
        step=0,
        new_requests=tuple(
            NewRequest(
                request_id=name,
                token_ids=(1, 2, 3),
                num_prompt_tokens=3,
                num_computed_tokens=0,
                block_ids=(),
                params=SamplingParams(),
            )
            for name in names
        ),
        finished_request_ids=finished,
    )


def drafted(source: GuardedProposer, *names: str) -> set[str]:
    return {n for n in names if source.propose(Outlook(n, KNOWN, 4), max_drafts=4).token_ids}


@pytest.mark.parametrize("call", ["begin", "extend", "propose"])
def test_a_proposer_that_raises_is_off_for_that_request(
    call: str, caplog: pytest.LogCaptureFixture
) -> None:
    seconds, counts = VirtualSeconds(), DraftCounts()
    troubled = Troubled(seconds)
    troubled.raises = {"b": call, "d": call}
    source = GuardedProposer(troubled, counts=counts, seconds=seconds)
    with caplog.at_level(logging.INFO):
        source.begin(step("a", "b", "c", "d"))
        for _ in range(5):
            source.extend(dict.fromkeys("abcd", (4,)))
            assert drafted(source, *"abcd") == {"a", "c"}
    assert counts.num_requests_failed == 2 and counts.num_requests_slow == 0
    assert len(caplog.records) == 1 and "goes on without drafts" in caplog.text
    assert troubled.live == {"a", "c"}
    source.begin(step(finished=("a", "b", "c", "d")))
    assert not troubled.live
    troubled.raises.clear()
    source.begin(step("b"))  # another request, or the same one resumed
    assert drafted(source, "b") == {"b"}


def test_an_end_that_raises_is_counted() -> None:
    seconds, counts = VirtualSeconds(), DraftCounts()
    troubled = Troubled(seconds)
    troubled.raises = {"a": "end"}
    source = GuardedProposer(troubled, counts=counts, seconds=seconds)
    source.begin(step("a"))
    source.begin(step(finished=("a",)))
    assert counts.num_requests_failed == 1 and not drafted(source, "a")


def test_a_proposer_that_is_slow_time_and_again_is_off_for_that_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seconds, counts = VirtualSeconds(), DraftCounts()
    troubled = Troubled(seconds)
    troubled.takes = {"b": 6e-3, "c": 4e-3}
    source = GuardedProposer(troubled, counts=counts, seconds=seconds)
    source.begin(step("a", "b", "c"))
    with caplog.at_level(logging.INFO):
        found = [drafted(source, "a", "b", "c") for _ in range(5)]
    assert found == [{"a", "b", "c"}] * 3 + [{"a", "c"}] * 2
    assert counts.num_requests_slow == 1 and len(caplog.records) == 1
    assert troubled.live == {"a", "c"}


def test_no_more_drafts_than_there_is_room_for() -> None:
    seconds = VirtualSeconds()
    source = GuardedProposer(Troubled(seconds), counts=DraftCounts(), seconds=seconds)
    source.begin(step("a"))
    assert source.propose(Outlook("a", KNOWN, 2), max_drafts=4) == ([7, 8], [0.9, 0.8])
    assert source.propose(Outlook("a", KNOWN, 9), max_drafts=1) == ([7], [0.9])
    assert source.propose(Outlook("a", KNOWN, 9), max_drafts=9) == ([7, 8, 9], [0.9, 0.8, 0.7])


@pytest.mark.parametrize(
    ("method", "kind"),
    [("off", NoDrafts), ("ngram", FixedDrafter), ("suffix", FixedDrafter), ("auto", AutoDrafter)],
)
def test_every_method_has_its_drafter(method: str, kind: type) -> None:
    drafter = make_drafter(SpeculativeConfig(method=method, num_speculative_tokens=3))
    assert isinstance(drafter, kind)
    drafter.begin(step("a"))
    assert drafter.num_wanted == (0 if method == "off" else 3)
    found = drafter.draft([Outlook("a", KNOWN, 3)], num_tokens=1)
    drafter.learn(found, {"a": (4,)}, num_tokens=1, seconds=0.005)


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_a_fixed_method_drafts_what_was_seen(method: str) -> None:
    drafter = make_drafter(SpeculativeConfig(method=method, num_speculative_tokens=2))
    drafter.begin(step("a"))
    known = np.asarray([1, 2, 3, 4, 1, 2, 3], np.int32)
    assert list(drafter.draft([Outlook("a", known, 8)], num_tokens=1)["a"]) == [4, 1]
    assert list(drafter.draft([Outlook("a", known, 1)], num_tokens=1)["a"]) == [4]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"method": "eagle9"},
            "method must be one of auto, ngram, suffix, eagle3, draft_model",
        ),
        ({"method": "draft_model"}, "model must be given with method draft_model"),
        ({"method": "eagle3", "model": ""}, "got '' with eagle3"),
        ({"method": "ngram", "model": "m"}, "got 'm' with ngram"),
        ({"method": "off", "model": "m"}, "got 'm' with off"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens must be from 1 to 64"),
        ({"prompt_lookup_min": 4, "prompt_lookup_max": 3}, "at most prompt_lookup_max=3, got 4"),
        ({"prompt_lookup_min": 0}, "prompt_lookup_min"),
        ({"suffix_decoding_max_spec_factor": 0.0}, "suffix_decoding_max_spec_factor"),
        ({"suffix_decoding_min_token_prob": 1.5}, "suffix_decoding_min_token_prob"),
        ({"suffix_decoding_max_cached_tokens": -1}, "suffix_decoding_max_cached_tokens"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SpeculativeConfig(**fields)  # type: ignore[arg-type]
