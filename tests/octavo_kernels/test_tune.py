"""Tuning: which choices win, what a table keeps, and what every shipped tunable promises."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from octavo_kernels import tune, tuning
from octavo_kernels.benchmarking import Timing
from octavo_kernels.tune import OnMeta, Trial
from octavo_kernels.tuning import Tunable


def trial(key: str, size: int, us: float | None, contender: str = "first", op: str = "op") -> Trial:
    timing = None
    if us is not None:
        timing = Timing(contender=contender, calls=9, median_s=us / 1e6, p10_s=0.0, p90_s=1.0)
    return Trial(op=op, key=key, choice={"size": size}, timing=timing, dropped="" if us else "no")


def test_the_fastest_finalist_wins() -> None:
    trials = [
        trial("a", 1, 10.0),
        trial("a", 2, 5.0),  # fast when alone, but not measured again
        trial("a", 4, 7.0, "final"),
        trial("a", 8, 6.5, "final"),
        trial("b", 1, None),
        trial("c", 1, 3.0),
    ]
    assert tune.best(trials) == {"op": {"a": {"size": 8}, "c": {"size": 1}}}


def test_a_table_keeps_what_was_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "new" / "h100.json"
    tune.write_table(path, [trial("b", 1, 2.0), trial("a", 4, 2.0), trial("x", 1, 1.0, op="old")])
    tune.write_table(path, [trial("a", 8, 2.0), trial("b", 2, None)])
    table = json.loads(path.read_text())
    assert table["choices"] == {
        "old": {"x": {"size": 1}},
        "op": {"a": {"size": 8}, "b": {"size": 1}},
    }
    assert list(table["choices"]["op"]) == ["a", "b"]
    assert set(table) == {"gpu", "versions", "commit", "choices"}
    assert list(path.parent.iterdir()) == [path]


def test_the_commit_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_COMMIT", "abc123")
    assert tune.passport()["commit"] == "abc123"


def test_choices_come_from_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_TABLES", tmp_path)
    tune.write_table(tmp_path / "h100.json", [trial("a", 8, 2.0)])
    cached: list[Any] = [tuning.table, tuning._choose, tuning.gpu_kind]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for function in cached:
        function.cache_clear()
    try:
        assert tuning.choose("op", "a", {"size": 1}) == {"size": 8}
        assert tuning.choose("op", "z", {"size": 1}) == {"size": 1}
        assert tuning.choose("other", "a", {"size": 1}) == {"size": 1}
    finally:
        for function in cached:
            function.cache_clear()


def test_tensors_of_any_maker_lie_on_meta() -> None:
    with OnMeta():
        made = [
            torch.randn(2, 3, device="cuda", generator=torch.Generator()),
            torch.tensor([1, 2], device="cuda"),
            torch.randperm(5).to("cuda", torch.int32),
            torch.full((2,), 1.0).to(device="cuda"),
            torch.zeros(2).cuda(),
            torch.arange(3, device="cuda").cpu(),
            torch.empty_like(torch.zeros(2)),
            torch.zeros(2).normal_(generator=torch.Generator()),
        ]
        made.append(made[0].to(torch.bfloat16) @ made[0].to(torch.bfloat16).T)
    assert {tensor.device.type for tensor in made} == {"meta"}
    assert made[2].dtype == torch.int32 and made[-1].shape == (2, 2)


@pytest.mark.parametrize("tunable", tune.tunables(), ids=lambda tunable: tunable.op)
def test_a_tunable_can_be_listed_without_a_gpu(tunable: Tunable) -> None:
    assert tunable.keys and len(set(tunable.keys)) == len(tunable.keys) and tunable.rotate >= 1
    for key in tunable.keys:
        choices = [dict(choice) for choice in tunable.candidates(key)]
        assert choices and len({str(choice) for choice in choices}) == len(choices), key
        assert all(isinstance(v, int) for choice in choices for v in choice.values()), key
    first, *others = tunable.candidates(tunable.keys[0])
    assert tune.launches_of(tunable, tunable.keys[0], first)
    for choice in others:
        with contextlib.suppress(ValueError):  # how a tunable says that it cannot be had here
            tune.launches_of(tunable, tunable.keys[0], choice)


def test_ops_are_tuned_once() -> None:
    names = [tunable.op for tunable in tune.tunables()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", sorted(tuning._TABLES.glob("*.json")), ids=lambda p: p.stem)
def test_a_shipped_table_holds_what_can_be_chosen(path: Path) -> None:
    table = json.loads(path.read_text())
    assert table["gpu"] and table["versions"] and table["commit"]
    known = {tunable.op: tunable for tunable in tune.tunables()}
    for op, choices in table["choices"].items():
        assert op in known, f"{op} is not tuned: a stale entry"
        for key, choice in choices.items():
            if key in known[op].keys:
                forms = {frozenset(candidate) for candidate in known[op].candidates(key)}
                assert frozenset(choice) in forms, f"{op} {key}: no candidate has these names"


def test_an_unknown_op_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--op", "nonesuch"])
    assert "nothing to tune in ['nonesuch']; there is [" in capsys.readouterr().err


def test_nothing_is_measured_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tune.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_keys_are_compiled_in_groups() -> None:
    def tunable(op: str, count: int) -> Tunable:
        return Tunable(
            op=op,
            keys=("a", "b", "c"),
            candidates=lambda _: [{"size": size} for size in range(count)],
            make=lambda key, choice: lambda: None,
        )

    todo = [(t, key) for t in (tunable("x", 150), tunable("y", 500)) for key in t.keys]
    groups = [[(t.op, key) for t, key in group] for group in tune.chunks(todo)]
    assert groups == [
        [("x", "a"), ("x", "b"), ("x", "c")],
        [("y", "a")],
        [("y", "b")],
        [("y", "c")],
    ]


def test_a_run_keeps_each_key_as_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = [{"size": 1}, {"size": 2}, {"size": 4}]
    measured: list[tuple[str, list[Any]]] = []
    prepared: list[int] = []  # keys measured before
    fake = Tunable(
        op="op",
        keys=("a 1", "b 1", "b 2"),
        candidates=lambda _: choices,
        make=lambda key, choice: lambda: None,
        prepare=lambda: prepared.append(len(measured)),
    )

    def measure(tunable: Tunable, key: str, left: Any) -> list[Trial]:
        measured.append((key, list(left)))
        if key == "b 2":
            raise RuntimeError("the GPU is gone")
        return [trial(key, choice["size"], 10.0 / choice["size"]) for choice in left]

    monkeypatch.setattr(tune, "tunables", lambda names: [fake])
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "_compile_chunk", lambda chunk, deadline: [trial("a 1", 4, None)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    out, log = tmp_path / "h100.json", tmp_path / "log.jsonl"
    arguments = ["--out", str(out), "--log", str(log)]
    with pytest.raises(RuntimeError, match="gone"):
        tune.main(arguments)
    assert measured == [("a 1", choices[:2]), ("b 1", choices), ("b 2", choices)]
    assert prepared == [0]
    kept = {"op": {"a 1": {"size": 2}, "b 1": {"size": 4}}}
    assert json.loads(out.read_text())["choices"] == kept
    assert len(log.read_text().splitlines()) == 6
    assert "op a 1: 5.0 us (default 10.0), 2 of 3 ran" in capsys.readouterr().out
    assert tune.main([*arguments, "--key", "b", "--seconds", "0"]) == 0
    assert "no time was left for 2 of 2 keys" in capsys.readouterr().out
    assert json.loads(out.read_text())["choices"] == kept
    assert tune.main([*arguments, "--key", "z"]) == 2


def adding(choice_of: Callable[[int], int]) -> Tunable:
    """x + 0 by torch; a choice of 3 fails, and one that choice_of changes gives other bits."""

    def make(key: str, choice: Any) -> Callable[[], torch.Tensor]:
        if choice["size"] == 3:
            raise RuntimeError("too large")
        x = torch.randn(int(key), device="cuda")

        def run() -> torch.Tensor:
            for _ in range(choice["size"]):
                y = x + choice_of(choice["size"])
            return y

        return run

    choices = [{"size": size} for size in (4, 3, 2, 1, 8, 6, 5)]
    return Tunable(op="add", keys=("1000",), candidates=lambda _: choices, make=make, rotate=3)


@pytest.mark.gpu
def test_a_choice_that_fails_or_changes_bits_is_dropped() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    tunable = adding(lambda size: int(size == 1))
    trials = tune.measure(tunable, "1000", tunable.candidates("1000"))
    dropped = {t.choice["size"]: t.dropped for t in trials if t.timing is None}
    assert set(dropped) == {3, 1}
    assert "too large" in dropped[3] and dropped[1] == "bits differ from the first"
    assert tune.best(trials) == {"add": {"1000": {"size": 2}}}
    finals = [t for t in trials if t.timing is not None and t.timing.contender == "final"]
    assert len(finals) == 4
