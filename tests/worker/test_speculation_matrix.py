"""Every pair of request parameters and engine features, with speculation and without it.

Rows of a covering array, each a request over HTTP to a tiny random model whose cache starts as NaN:
what the client gets must be what a plain engine without speculation answers, to the last bit of a
log-probability. ``pytest -s`` prints the rows.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from octavo.config import SpeculativeConfig
from octavo.models import Model
from octavo.speculative import BatchProposer, NoDrafts, make_drafter
from octavo.speculative.controller import AutoDrafter, FixedDrafter, FixedModelDrafter
from octavo.speculative.ngram import NgramProposer
from octavo.speculative.proposer import Proposal, TokenIds
from octavo.speculative.suffix import SuffixProposer
from octavo.types import EngineRequest, SamplingParams
from octavo.worker.drafting.startup import LoadedDraftModel
from octavo.worker.model_runner import ModelRunner
from tests.api.serving import small_tokenizer
from tests.worker.covering import Row, all_pairs, covering_rows, pair, pairs_of
from tests.worker.served_runner import ServedRunner, Setup, ask
from tests.worker.test_model_drafts import load_head, write_head, write_parallel_head

Make = Callable[..., ModelRunner]
VOCAB_SIZE = 300
NUM_MATES = 3
_LETTERS = tuple(range(3, 97))  # tokens of one printable character each

# Parameter -> value's name -> fields of the request's body.
REQUEST: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "draw": {
        "greedy": {"temperature": 0},
        "T=0.7": {"temperature": 0.7, "seed": 11},
        "T=1.4": {"temperature": 1.4, "seed": -3},
    },
    "top_p": {"-": {}, "0.9": {"top_p": 0.9}},
    "top_k": {"-": {}, "4": {"top_k": 4}},
    "min_p": {"-": {}, "0.05": {"min_p": 0.05}},
    "repetition_penalty": {"-": {}, "1.2": {"repetition_penalty": 1.2}},
    "presence_penalty": {"-": {}, "0.6": {"presence_penalty": 0.6}},
    "frequency_penalty": {"-": {}, "-0.5": {"frequency_penalty": -0.5}},
    "logit_bias": {"-": {}, "3 ids": {"logit_bias": {"40": 3, "70": 2.5, "260": -100}}},
    "bad_words": {"-": {}, "some": {"bad_words": ["a", "th", "he ", "Q9", "zz"]}},
    "allowed_token_ids": {"-": {}, "letters": {"allowed_token_ids": [*_LETTERS, 261, 270]}},
    "min_tokens": {"-": {}, "half": {"min_tokens": 0.5}},  # of max_tokens
    "stop": {"-": {}, "texts": {"stop": [*"0123456789%]+@", "Kx", "jw"]}},
    "stop_token_ids": {"-": {}, "six": {"stop_token_ids": [9, 60, 61, 120, 200, 262]}},
    "ignore_eos": {"-": {}, "true": {"ignore_eos": True}},
    "include_stop_str_in_output": {"-": {}, "true": {"include_stop_str_in_output": True}},
    "skip_special_tokens": {"-": {}, "false": {"skip_special_tokens": False}},
    "max_tokens": {"60": {"max_tokens": 60}, "17": {"max_tokens": 17}, "5": {"max_tokens": 5}},
    "logprobs": {"-": {}, "0": {"logprobs": 0}, "3": {"logprobs": 3}},
    "prompt_logprobs": {"-": {}, "2": {"prompt_logprobs": 2}},
    "n": {"1": {}, "3": {"n": 3}},
    "echo": {"-": {}, "true": {"echo": True}},
    "stream": {
        "-": {},
        "true": {"stream": True},
        "usage": {"stream": True, "stream_options": {"include_usage": True}},
    },
    "cache_salt": {"-": {}, "salt": {"cache_salt": "s"}},
    "truncate_prompt_tokens": {"-": {}, "33": {"truncate_prompt_tokens": 33}},
    "return_tokens_as_token_ids": {"-": {}, "true": {"return_tokens_as_token_ids": True}},
    "return_spec_stats": {"-": {}, "true": {"return_spec_stats": True}},
    "route": {"completions": {}, "chat": {}},
    "best_of": {"-": {}, "n + 1": {"best_of": 1}},  # and n
}
# Pairs that the API refuses.
IMPOSSIBLE = {
    pair(("best_of", "n + 1"), other)
    for other in (("route", "chat"), ("stream", "true"), ("stream", "usage"))
} | {pair(("route", "chat"), ("echo", "true"))}
# Feature -> value's name -> what it changes of the engine.
ENGINE: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "proposer": dict.fromkeys(
        (
            *("ngram", "suffix", "auto", "draft model", "head", "auto with head"),
            "parallel head",
            *("right", "half right", "wrong", "failing"),
        ),
        {},
    ),
    "drafts": {"1": {"max_drafts": 1}, "4": {"max_drafts": 4}, "16": {"max_drafts": 16}},
    "prefix cache": {
        "cold": {},
        "hit": {},
        "off": {"has_prefix_cache": False},
        "host tier": {"num_host_slots": 40},
    },
    "step tokens": {"512": {}, "37": {"step_tokens": 37}},
    "blocks": {"many": {}, "few": {}},  # few: some request is preempted
    "block size": {"16": {}, "32": {"block_size": 32}},
    "overlap": {"-": {}, "async": {"max_inflight": 2}},
    "policy": {"fcfs": {}, "0": {"policy": "priority"}, "5": {"policy": "priority"}},
    "mates": dict.fromkeys(("-", "3", "3, aborted"), {}),
}
PARAMETERS = {name: list(values) for name, values in {**REQUEST, **ENGINE}.items()}
PAIRS = all_pairs(PARAMETERS, impossible=IMPOSSIBLE)
ROWS = covering_rows(PARAMETERS, seed=3, impossible=IMPOSSIBLE)
TOKENIZER = small_tokenizer(vocab_size=VOCAB_SIZE)


class Scripted:
    """`Proposer` that knows what requests generate, and spoils a share of it; or raises at times.

    ``role_of`` makes of a request's id the name under which ``truth`` has its tokens.
    """

    def __init__(
        self,
        truth: Mapping[str, Sequence[int]],
        *,
        role_of: Callable[[str], str],
        error: float,
        is_failing: bool = False,
    ) -> None:
        self._truth, self._role_of = truth, role_of
        self._error, self._is_failing = error, is_failing
        self._rng = random.Random(4)
        self._starts: dict[str, int] = {}

    def begin(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        num_prompt_tokens: int,
        salt: str | None,
    ) -> None:
        self._starts[request_id] = num_prompt_tokens

    def extend(self, request_id: str, token_ids: Sequence[int]) -> None:
        pass

    def end(self, request_id: str) -> None:
        del self._starts[request_id]

    def propose(self, request_id: str, token_ids: TokenIds, *, max_drafts: int) -> Proposal:
        if self._is_failing and self._rng.random() < 0.05:
            raise RuntimeError("told to fail")
        at = len(token_ids) - self._starts[request_id]
        truth = list(self._truth.get(self._role_of(request_id), ())[at : at + max_drafts])
        right = truth + [7] * (max_drafts - len(truth))  # behind the end of a text too
        spoilt = [self._rng.randrange(VOCAB_SIZE) for _ in right]
        pairs = zip(right, spoilt, strict=True)
        return Proposal([b if self._rng.random() < self._error else a for a, b in pairs])


class Ticks:
    """A clock that moves by as much whenever it is read: `auto` decides the same each time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._now = 0.0

    def __call__(self) -> float:
        self._now += self._seconds
        return self._now


def role_of(request_id: str) -> str:
    """``cmpl-row-<process>-<serial>-<choice>``, or ``chatcmpl-``, is a choice of the row's request,
    wherever."""
    kind, name, *parts = request_id.split("-")
    is_rows = kind in ("cmpl", "chatcmpl") and name == "row"
    return f"choice {parts[-1]}" if is_rows else request_id


AnyDrafter = FixedDrafter | FixedModelDrafter | AutoDrafter
# Proposers that are models, and the methods that take them.
MODELS: Mapping[str, Any] = {
    "draft model": "draft_model",
    "head": "eagle3",
    "parallel head": "eagle3",
    "auto with head": "auto",
}


def drafter_of(
    proposer: str,
    depth: int,
    truth: Mapping[str, Sequence[int]],
    *,
    model: BatchProposer | None = None,
) -> AnyDrafter:
    if proposer == "auto" or proposer in MODELS:
        config = SpeculativeConfig(
            method=MODELS.get(proposer, "auto"),
            model=None if model is None else "m",
            num_speculative_tokens=depth,
        )
        made = make_drafter(config, model=model, seconds=Ticks(1e-6))
        assert not isinstance(made, NoDrafts)
        return made
    errors = {"right": 0.0, "half right": 0.5, "wrong": 1.0, "failing": 0.2}
    source: Any
    if proposer == "ngram":
        source = NgramProposer(min_length=1, max_length=4)
    elif proposer == "suffix":
        source = SuffixProposer(spec_factor=4.0, min_token_prob=0.05)
    else:
        is_failing = proposer == "failing"
        error = errors[proposer]
        source = Scripted(truth, role_of=role_of, error=error, is_failing=is_failing)
    return FixedDrafter(source, num_drafts=depth, seconds=Ticks(1e-6))


def body_of(row: Row, number: int) -> dict[str, Any]:
    """The request: a phrase of letters and words, again and again."""
    rng = random.Random(number)
    phrase = [rng.choice(_LETTERS) for _ in range(rng.randint(4, 12))]
    prompt = (phrase * 20)[: rng.randint(45, 70)]
    body: dict[str, Any] = {"request_id": "row", "return_token_ids": True}
    for name in REQUEST:
        body |= REQUEST[name][row[name]]
    if "best_of" in body:
        body["best_of"] += body.get("n", 1)
    if row["route"] == "completions":
        body["prompt"] = prompt
    else:
        body["messages"] = [{"role": "user", "content": TOKENIZER.decode(prompt)}]
        if "logprobs" in body:
            body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
    if "min_tokens" in body:
        body["min_tokens"] = body["max_tokens"] // 2
    if row["policy"] not in ("fcfs", "0"):
        body["priority"] = int(row["policy"])
    return body


def mates_of(number: int) -> list[EngineRequest]:
    rng = random.Random(-1 - number)
    return [
        EngineRequest(
            request_id=f"mate-{i}",
            prompt_token_ids=tuple([rng.choice(_LETTERS) for _ in range(9)] * 4),
            params=SamplingParams(
                max_tokens=60, temperature=0.6 * i, seed=i, ignore_eos=True, top_k=3
            ),
            priority=i,
        )
        for i in range(NUM_MATES)
    ]


def setup_of(row: Row) -> Setup:
    changes: dict[str, Any] = {}
    for name in ENGINE:
        changes |= ENGINE[name][row[name]]
    if row["blocks"] == "few":  # the longest request fits, and hardly more
        changes["num_blocks"] = 11 if row["block size"] == "16" else 6
    return Setup(**changes)


@dataclass
class Tally:
    """What the whole matrix did."""

    drafted: Counter[str] = field(default_factory=Counter)  # by proposer
    accepted: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0
    loaded_blocks: int = 0
    failed: int = 0
    told: int = 0  # accepted drafts, by `return_spec_stats`


class Matrix:
    """Runs rows; keeps count."""

    def __init__(self, make_runner: Make, *, models: Mapping[str, Any]) -> None:
        self._make = make_runner
        self._models = models
        self.tally = Tally()

    def check(self, row: Row, number: int) -> str:
        """Runs a row both ways; its line of the table. Raises AssertionError on a difference."""
        body, mates = body_of(row, number), mates_of(number)
        plain = ServedRunner(self._make(num_blocks=200), Setup(), vocab_size=VOCAB_SIZE)
        given = {k: v for k, v in body.items() if k != "priority"}
        want = asyncio.run(self._answer(plain, given, mates, is_warm=False, num_outputs=0))
        truth = {role_of(name): tokens for name, tokens in plain.tokens.items()}
        setup = setup_of(row)
        runner, drafter = self._drafting(row, setup, truth)
        engine = ServedRunner(runner, setup, vocab_size=VOCAB_SIZE)
        found = asyncio.run(
            self._answer(
                engine,
                body,
                mates if row["mates"] != "-" else [],
                is_warm=row["prefix cache"] in ("hit", "host tier"),
                num_outputs=9 if row["mates"] == "3, aborted" else 0,
            )
        )
        told = {name: value for name, value in row.items() if value != PARAMETERS[name][0]}
        assert found == want, f"row {number}: {told}"
        assert all(not any(map(bool, stats.values())) for stats in plain.spec_stats)
        for stats in engine.spec_stats:  # mates have drafts too
            assert stats["num_draft_tokens"] <= drafter.counts.num_draft_tokens
            assert sum(stats["num_accepted_tokens_per_pos"]) == stats["num_accepted_tokens"]
            self.tally.told += stats["num_accepted_tokens"]
        if row["mates"] == "3":
            assert all(engine.tokens[mate.request_id] == truth[mate.request_id] for mate in mates)
        return self._line(row, number, drafter, engine, want)

    def _drafting(
        self, row: Row, setup: Setup, truth: Mapping[str, Sequence[int]]
    ) -> tuple[ModelRunner, AnyDrafter]:
        made: list[AnyDrafter] = []

        def make(model: BatchProposer | None = None) -> AnyDrafter:
            made.append(drafter_of(row["proposer"], setup.max_drafts, truth, model=model))
            return made[0]

        loaded = self._models.get(row["proposer"])
        runner = self._make(
            num_blocks=setup.num_blocks,
            block_size=setup.block_size,
            num_host_slots=setup.num_host_slots,
            loaded=loaded,
            drafter_with=make,
            drafter=make() if loaded is None else None,
            seconds=Ticks(1e-2),
        )
        return runner, made[0]

    async def _answer(
        self,
        engine: ServedRunner,
        body: Mapping[str, Any],
        mates: Sequence[EngineRequest],
        *,
        is_warm: bool,
        num_outputs: int,
    ) -> Any:
        """What the client gets, among mates that are aborted after some outputs, if any."""
        if is_warm:
            warm = {"max_tokens": 1, "request_id": "warm", "cache_salt": body.get("cache_salt")}
            asked = {key: body[key] for key in ("prompt", "messages") if key in body}
            await ask(engine, {**asked, **warm}, tokenizer=TOKENIZER)
        for mate in mates:
            if num_outputs:
                engine.aborts[mate.request_id] = num_outputs
            engine.add(mate)
        answer = await ask(engine, body, tokenizer=TOKENIZER)
        await engine.rest()
        await engine.close()
        return answer

    def _line(
        self,
        row: Row,
        number: int,
        drafter: AnyDrafter,
        engine: ServedRunner,
        answer: Mapping[str, Any],
    ) -> str:
        counts, tally = drafter.counts, self.tally
        tally.drafted[row["proposer"]] += counts.num_draft_tokens
        tally.accepted[row["proposer"]] += counts.num_accepted_tokens
        tally.failed += counts.num_requests_failed
        tally.preemptions += engine.num_preemptions
        tally.loaded_blocks += engine.num_loaded_blocks
        for choice in answer["choices"]:
            how = "text" if isinstance(choice.get("stop_reason"), str) else "token"
            reason = choice["finish_reason"]
            tally.reasons[f"stop by {how}" if reason == "stop" else reason] += 1
        told = [f"{k}={v}" for k, v in row.items() if k != "proposer" and v != PARAMETERS[k][0]]
        tokens = sum(len(choice["token_ids"]) for choice in answer["choices"])
        return (
            f"{number:3} {row['proposer']:10} {tokens:4} tokens, drafts "
            f"{counts.num_accepted_tokens:3} of {counts.num_draft_tokens:3} accepted, same bits: "
            f"{', '.join(told)}"
        )


@pytest.mark.usefixtures("one_torch_thread")
def test_every_pair_of_parameters_with_and_without_speculation(
    make_runner: Make, model: Model, tmp_path: Path
) -> None:
    head = load_head(write_head(tmp_path / "head"), model)
    models = {
        "head": head,
        "auto with head": head,
        "parallel head": load_head(write_parallel_head(tmp_path / "parallel"), model),
        "draft model": LoadedDraftModel(name="model", model=model),
    }
    matrix = Matrix(make_runner, models=models)
    for number, row in enumerate(ROWS):
        print(matrix.check(row, number))
    tally = matrix.tally
    print(
        f"{len(ROWS)} rows, {len(PAIRS)} pairs of {len(PARAMETERS)} parameters; "
        f"{tally.drafted.total()} drafts, {tally.accepted.total()} accepted; "
        f"{tally.preemptions} preemptions, {tally.loaded_blocks} blocks from the host tier, "
        f"{tally.failed} failed proposers; ends: {dict(tally.reasons)}"
    )
    assert set().union(*map(pairs_of, ROWS)) == PAIRS
    # The matrix would prove little if these did not happen in it.
    for proposer in ENGINE["proposer"]:
        accepted, drafted = tally.accepted[proposer], tally.drafted[proposer]
        assert drafted > 0, proposer
        assert accepted > 0 or proposer in ("wrong", "head", "parallel head"), proposer
        assert accepted < drafted or proposer in ("right", "draft model"), proposer
    assert tally.accepted["wrong"] < 0.1 * tally.drafted["wrong"]
    assert 0 < tally.told < tally.accepted.total()
    assert tally.preemptions > 0 and tally.loaded_blocks > 0 and tally.failed > 0
    assert set(tally.reasons) == {"stop by text", "stop by token", "length"}
