"""`octavo distill` from prompts to a head, in miniature: it learns, goes on, shares its work."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.cli import main
from octavo.distill.head import load_head
from octavo.llm import LLM, Generation

FLAGS = [
    "--num-samples", "48", "--num-eval-samples", "8", "--max-new-tokens", "24",
    "--draft-vocab-size", "200", "--aux-layers", "0", "1", "3", "--intermediate-size", "64",
    "--window", "16", "--unroll-steps", "3", "--measure-depth", "3", "--seed", "1",
    "--learning-rate", "5e-3", "--per-device-batch-size", "8", "--quantization", "none",
    "--num-threads", "1", "--max-model-len", "64", "--kv-cache-memory-bytes", "4MiB",
]  # fmt: skip


@pytest.fixture(scope="module")
def generated(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that every run here learns from."""
    folder = tmp_path_factory.mktemp("texts")
    distil(target_folder, folder, "--max-steps", "1")
    assert len((folder / "generated.jsonl").read_text().splitlines()) == 48
    return folder / "generated.jsonl"


def distil(target: Path, output: Path, *more: str) -> None:
    assert main(["distill", str(target), "--output", str(output), *FLAGS, *more]) == 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_head(folder)[0].state_dict())


def measured(folder: Path) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = json.loads((folder / "acceptance.json").read_text())
    return history


def assert_equal(one: Path, other: Path, *, tolerance: float = 0.0) -> None:
    a, b = weights(one), weights(other)
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("more", [(), ("--parallel-drafting", "--unroll-warmup-ratio", "0.2")])
def test_acceptance_rises(
    target_folder: Path,
    generated: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
) -> None:
    distil(target_folder, tmp_path, "--generated", str(generated), "--max-steps", "120", *more)
    before, after = (entry["held out"]["tokens_per_step"] for entry in measured(tmp_path))
    assert before < 1.2 and after > before + 0.3, (before, after)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["texts_of"] == "held out" and told["tokens_per_step"] == after
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["octavo"]["acceptance"]["held out"]["tokens_per_step"] == after
    assert config["octavo"]["target"]["name"] == str(target_folder)
    plain, drafted = (
        answers(target_folder, speculative)
        for speculative in ({"method": "off"}, {"method": "eagle3", "model": str(tmp_path)})
    )
    assert [each.token_ids for each in drafted] == [each.token_ids for each in plain]
    stats = [each.outputs[0].draft_stats for each in drafted]
    num_accepted = sum(each.num_accepted_tokens for each in stats)
    assert 1 + num_accepted / sum(each.num_drafts for each in stats) > before + 0.3


def answers(target: Path, speculative: dict[str, Any]) -> list[Generation]:
    """Of the engine, to prompts that were not trained on."""
    llm = LLM(
        str(target),
        quantization="none",
        num_threads=1,
        max_model_len=64,
        kv_cache_memory_bytes=4 << 20,
        speculative_config={**speculative, "num_speculative_tokens": 3},
    )
    prompts = [(first, first + 1, 9) for first in range(5, 45, 5)]
    return llm.generate(prompts, temperature=0.0, max_tokens=40, ignore_eos=True)


def test_goes_on_as_if_never_interrupted(
    target_folder: Path, generated: Path, tmp_path: Path
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    flags = [
        "--generated", str(generated), "--num-epochs", "2", "--save-steps", "3",
        "--save-total-limit", "9", "--hidden-dropout", "0.2", "--cache-hidden-states",
    ]  # fmt: skip
    distil(target_folder, whole, *flags)
    assert sorted(p.name for p in whole.glob("checkpoint-*")) == [
        "checkpoint-10", "checkpoint-3", "checkpoint-6", "checkpoint-9"
    ]  # fmt: skip
    distil(target_folder, part, *flags, "--resume-from-checkpoint", str(whole / "checkpoint-3"))
    assert_equal(whole, part)
    assert [entry["step"] for entry in measured(part)] == [3, 10]


def test_two_ranks_are_one(target_folder: Path, generated: Path, tmp_path: Path) -> None:
    flags = ["--generated", str(generated), "--max-steps", "4"]
    distil(target_folder, tmp_path / "one", *flags)
    two = ["--output", str(tmp_path / "two"), *FLAGS, *flags, "--per-device-batch-size", "4"]
    run_ranks(2, ["distill", str(target_folder), *two, "--save-steps", "2"])
    assert_equal(tmp_path / "one", tmp_path / "two", tolerance=2e-3)
    # What two ranks have saved, one can go on from.
    resumed = ["--save-steps", "9", "--resume-from-checkpoint"]
    distil(target_folder, tmp_path / "on", *flags, *resumed, str(tmp_path / "two" / "checkpoint-2"))
    assert_equal(tmp_path / "one", tmp_path / "on", tolerance=2e-3)


def run_ranks(count: int, words: Sequence[str]) -> None:
    """What torchrun does, without its agent."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    roots = [str(Path(__file__).resolve().parents[2] / name) for name in ("server", "kernels")]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "octavo", *words],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(roots),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "WORLD_SIZE": str(count),
                "GLOO_SOCKET_IFNAME": "lo",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    ends = [process.communicate(timeout=120)[1] for process in started]
    assert not any(process.returncode for process in started), "\n".join(ends)


def test_mixed_precision_and_accumulation(
    target_folder: Path, generated: Path, tmp_path: Path
) -> None:
    flags = ["--generated", str(generated), "--max-steps", "3"]
    distil(target_folder, tmp_path / "a", *flags)
    halves = ["--per-device-batch-size", "2", "--gradient-accumulation-steps", "4"]
    distil(target_folder, tmp_path / "b", *flags, *halves)
    assert_equal(tmp_path / "a", tmp_path / "b", tolerance=2e-3)
    for precision in ("--bf16", "--fp16"):
        distil(target_folder, tmp_path / precision, *flags, precision)
        assert_equal(tmp_path / "a", tmp_path / precision, tolerance=5e-2)


def test_eval_prompts_are_sets_of_their_own(
    target_folder: Path, generated: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "questions.txt"
    prompts.write_text("a b\nc d e\n")
    flags = ["--generated", str(generated), "--max-steps", "1", "--eval-prompts", str(prompts)]
    distil(target_folder, tmp_path / "out", *flags)
    (before, after) = measured(tmp_path / "out")
    assert before["questions"]["texts"] == 2 and "held out" not in after


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--window", "1"], "--window must be at least 2, got 1"),
        (["--learning-rate", "-1"], "--learning-rate must be at least 1e-09, got -1"),
        (["--bf16", "--fp16"], "--bf16 and --fp16 exclude each other"),
        (["--aux-layers", "1", "2"], "--aux-layers must be three"),
        (["--prompts", "none.jsonl"], "prompts cannot be read"),
        (["--resume-from-checkpoint", "latest"], "holds no checkpoint"),
        (["--resume-from-checkpoint", "none"], "none is no checkpoint"),
        (["--per-device-batch-size", "99"], "--per-device-batch-size times"),
        (["--aux-layers", "1", "2", "4"], "--aux-layers must rise from 0 to at most 3"),
        (["--temperatures", "-1"], "--temperatures must be"),
    ],
)
def test_bad_input(
    target_folder: Path,
    generated: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    words = [str(target_folder), "--output", str(tmp_path), *FLAGS, "--generated", str(generated)]
    assert main(["distill", *words, *flags]) == 2
    assert message in capsys.readouterr().err


def test_begins_with_another_head(
    target_folder: Path, generated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--generated", str(generated), "--max-steps", "120"]
    distil(target_folder, tmp_path / "a", *flags)
    more = ["--generated", str(generated), "--max-steps", "1", "--init-from-head"]
    distil(target_folder, tmp_path / "b", *more, str(tmp_path / "a"))
    begun, ended = measured(tmp_path / "b")[0]["held out"], measured(tmp_path / "a")[-1]["held out"]
    assert abs(begun["tokens_per_step"] - ended["tokens_per_step"]) < 0.1  # it was stored in fp16
    words = [
        str(target_folder),
        "--output",
        str(tmp_path / "c"),
        *FLAGS,
        *more,
        str(tmp_path / "a"),
    ]
    assert main(["distill", *words, "--window", "32"]) == 2
    assert "--init-from-head: its window is 16, that asked for is 32" in capsys.readouterr().err


def test_another_runs_checkpoint(target_folder: Path, generated: Path, tmp_path: Path) -> None:
    flags = ["--generated", str(generated), "--max-steps", "1"]
    distil(target_folder, tmp_path, *flags)
    words = [str(target_folder), "--output", str(tmp_path), *FLAGS, *flags, "--max-steps", "5"]
    assert main(["distill", *words, "--resume-from-checkpoint", "latest"]) == 2
