"""Acceptance along recorded answers: what is counted, and who is asked for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import spec_acceptance
from benchmarks.spec_acceptance import (
    SETS,
    Answer,
    cost_of,
    read,
    replay_auto,
    replay_known,
    replay_proposer,
)
from octavo.observability.metrics import Metrics
from octavo.speculative.ngram import NgramProposer
from octavo.text.tokenizer import Tokenizer
from tests.api.serving import ScriptedEngine, serving, small_tokenizer


def answer(tokens: list[int], start: int) -> Answer:
    return Answer(tokens=np.asarray(tokens, np.int32), start=start)


def test_lengths_are_counted_over_steps_with_drafts() -> None:
    """The answer says the prompt again, and one thing that nobody could know in its middle."""
    phrase = list(range(10, 20))
    one = answer([*phrase, 5, *phrase[:6], 99, *phrase[6:], 7], start=11)
    found = replay_proposer(lambda: NgramProposer(min_length=2, max_length=5), [one], 3)
    # Behind 10 11 come 12 13 14, all right; behind 15, 16 17 18, all wrong as 99 comes; and
    # behind 16 17 come 18 19 (and 5, for which there is no more room).
    assert (found["drafts"], found["mean_accepted_length"]) == (3, 2.667)
    assert found["accepted"] == pytest.approx(5 / 8, abs=1e-3)


def test_what_drafts_would_bring_if_they_were_known_bounds_what_they_bring() -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(0, 40, 120).tolist()
    answers = [answer([*text, 99, *text[20 * i :], *text[: 20 * i]], start=121) for i in range(6)]
    cost = cost_of("100=1:30,2:33,9:50;300=1:40,2:44,9:80")
    known = replay_known(answers, cost=cost, k=8)
    auto = replay_auto(answers, requests=1, cost=cost, k=8)
    assert known["tokens_per_step"] > 4 and known["speedup"] > auto["speedup"] > 1.5


def test_costs_are_read_by_context_and_tokens() -> None:
    cost = cost_of("100=1:3,3:4;300=1:5,3:8")
    assert cost(1, 50) == pytest.approx(3e-3) and cost(2, 100) == pytest.approx(3.5e-3)
    assert cost(3, 200) == pytest.approx(6e-3) and cost(3, 900) == pytest.approx(8e-3)
    assert cost_of("1:2,5:4")(3, 700) == pytest.approx(3e-3)


def test_a_server_is_asked_and_its_counts_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in SETS:
        lines = [json.dumps({"turns": [f"{name} {i}", "more"]}) for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    tokenizer: Tokenizer = small_tokenizer()
    out = tmp_path / "answers.jsonl"
    metrics = Metrics(ScriptedEngine(vocab_size=600).info, model_name="tiny")
    with serving(tokenizer=tokenizer, metrics=metrics) as server:
        arguments: list[Any] = ["peer", out, "--data", tmp_path, "--base-url", f"{server.url}/v1"]
        arguments += ["--model", "tiny", "--label", "it", "--k", 5, "--prompts", 2, "--tokens", 9]
        spec_acceptance.main([str(each) for each in arguments])
    found = read(str(out))
    assert {name: len(answers) for name, answers in found.items()} == dict.fromkeys(SETS, 2)
    first = found[SETS[0]][0]
    assert "prompts_sum 0" in tokenizer.decode(first.tokens[: first.start].tolist())
    assert 1 <= len(first.tokens) - first.start <= 9
    rows = capsys.readouterr().out.splitlines()
    assert (
        len(rows) == len(SETS)
        and "set prompts_sum  method it  k 5  mean_accepted_length 1.0" in rows[0]
    )
