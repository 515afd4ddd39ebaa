"""The benchmark of speculation over HTTP: its turns, its rows, its table and its picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import spec_serve
from benchmarks.servers import Server
from octavo.config import ModelConfig
from octavo.observability.metrics import Metrics
from tests.api.serving import ScriptedEngine, serving, small_tokenizer
from tests.api.serving import Server as Serving


def row(mode: str, concurrency: int, tps: float, **more: Any) -> dict[str, Any]:
    about = {"cpu": "a CPU", "cores": 2, "commit": "abc", "run": "2026-01-02"}
    return {
        **about,
        "set": "prompts_sum",
        "mode": mode,
        "concurrency": concurrency,
        "rep": 0,
        "out_tps": tps,
        "texts": "same",
        **more,
    }


ROWS = [
    row("auto", 1, 150.0),
    row("off", 1, 90.0),
    row("off", 1, 110.0, rep=1),
    row("n-gram, 5", 1, 120.0),
    row("off", 16, 300.0),
    row("auto", 16, 297.0),
]


def arguments(data: Path, **given: Any) -> argparse.Namespace:
    chosen = {"reps": 2, "sets": ["prompts_a"], "concurrency": [1, 2], "requests": {1: 2, 2: 5}}
    return argparse.Namespace(data=data, tokens=8, **(chosen | given))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = [json.dumps({"turns": [f"Question {i}", "again"]}) for i in range(4)]
    (tmp_path / "prompts_a.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_turns_share_nothing_that_was_computed(data: Path) -> None:
    found = list(spec_serve.turns(arguments(data), salt="run"))
    assert [(turn.concurrency, len(turn.talks)) for turn in found] == [(1, 2), (2, 5)] * 2
    seen = set()
    for turn in found:
        for index in range(len(turn.talks)):
            target, prompt = turn.request(index, "http://x/v1")
            asked = (prompt.text, target.body["cache_salt"])
            assert asked not in seen
            seen.add(asked)
    first, again = found[0], found[2]
    assert first.talks == ("Question 0", "Question 1")
    assert again.talks == ("Question 2", "Question 3")


def test_the_table_compares_medians_with_the_first_mode() -> None:
    lines = spec_serve.table(ROWS).splitlines()
    assert lines[0] == "| set | concurrency | off | n-gram, 5 | auto |"
    assert lines[2] == "| prompts_sum | 1 | 100 | 120 (1.20x) | 150 (1.50x) |"
    assert lines[3] == "| prompts_sum | 16 | 300 | - | 297 (0.99x) |"
    assert lines[-1].endswith("abc, 2026-01-02; the same texts from all modes")
    changed = [*ROWS, row("other", 16, 1.0, texts="another")]
    assert "DIFFERENT TEXTS in 1 turns" in spec_serve.table(changed)
    assert spec_serve.table(changed).splitlines()[3].endswith("| 297 (0.99x) | 1 (0.00x) |")


def test_the_latest_run_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="has no rows"):
        spec_serve.latest_run(path)
    older = [{**each, "run": "2025-01-01"} for each in ROWS]
    path.write_text("\n".join(map(json.dumps, [*older, *ROWS, *older])))
    assert spec_serve.latest_run(path) == ROWS


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    spec_serve.plot(ROWS, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def server() -> Iterator[Serving]:
    info = ScriptedEngine(vocab_size=600).info
    metrics = Metrics(info, model_name="m")
    with serving(
        tokenizer=small_tokenizer(), model=ModelConfig(model="m"), metrics=metrics
    ) as running:
        yield running


def test_a_row_of_a_turn(data: Path, server: Serving) -> None:
    measured = Server("off", server.port, None, 0.0)  # type: ignore[arg-type]
    turn = list(spec_serve.turns(arguments(data), salt="run"))[1]
    found = spec_serve.measure(measured, turn)
    assert (found["requests"], found["concurrency"], found["drafts"]) == (5, 2, 0)
    assert 5 <= found["out_tokens"] <= 40 and found["mean_accepted_length"] == 0
    assert found["out_tps"] == pytest.approx(found["out_tokens"] / found["seconds"], rel=0.2)
    assert spec_serve.measure(measured, turn)["texts"] == found["texts"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(server.app.state.front), "model_names", ("another",))
        with pytest.raises(RuntimeError, match="5 of 5 requests failed: HTTP 404"):
            spec_serve.measure(measured, turn)
