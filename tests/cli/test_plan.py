"""``octavo plan``: the same plan as a server's, told without a GPU and without weights."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from octavo.checkpoint import parse_config, source
from octavo.cli import main
from octavo.cli.plan import GPUS, speed_bounds
from octavo.config import EngineConfig, ModelConfig, SchedulerConfig
from octavo.worker.gpu.memory_plan import GIB, plan_gpu_memory

CONFIGS = Path(__file__).parent / "models"
QUICK = ["--max-cudagraph-capture-size", "4"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder with nothing but its config.json."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    shutil.copy(CONFIGS / "qwen3-0.6b.json", tmp_path / "config.json")
    return tmp_path


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--json", *QUICK]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found: dict[str, Any] = json.loads(printed.out)
    return found


def test_it_is_the_servers_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--gpu-memory", "8GiB", "--max-model-len", "4096", "--max-num-seqs", "32")
    found = planned(capsys, str(folder), *words)
    spec = parse_config(json.loads((folder / "config.json").read_text()))
    config = EngineConfig(
        model=ModelConfig(max_model_len=4096),
        scheduler=SchedulerConfig(max_num_seqs=32, max_cudagraph_capture_size=4),
    )
    plan = plan_gpu_memory(spec, config, total_bytes=8 * GIB)
    assert found["num_blocks"] == plan.sizes.num_blocks
    assert found["used_bytes"] == plan.used_bytes == sum(p["num_bytes"] for p in found["parts"])
    assert found["kv_cache_tokens"] == 16 * plan.sizes.num_blocks
    assert found["max_model_len"] == 4096 and found["max_num_seqs"] == 32
    assert found["gpu_memory_bytes"] == 8 * GIB and found["bounds"] is None
    blocks = plan.sizes.num_blocks
    assert found["concurrency"] == {
        "1024": min(32, blocks // 64),
        "4096": min(32, blocks // 256),
    }


def test_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--gpu", "rtx4090", "--gpu-memory", "4GiB", *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}, bfloat16, on RTX 4090, 4.00 GiB"
    table = [line for line in lines if " GiB" in line][1:]
    sizes = {line.split("  ")[0]: float(line.split(" GiB")[0].split()[-1]) for line in table}
    total = sizes.pop("total")
    assert total + sizes.pop("left") == pytest.approx(4, abs=0.002)
    assert sum(sizes.values()) == pytest.approx(total, abs=0.02)
    assert {"CUDA context", "weights: attention", "K/V cache", "activations"} <= set(sizes)
    assert any("cut from 40960 to" in line for line in lines)
    assert any(line.strip().startswith("1 request ") and "output" in line for line in lines)


def test_bounds_are_the_roofline() -> None:
    """An 8B model on an H100: a step of one request of 1,024 tokens streams 15.01 GB of weights
    and 0.134 GB of K and V; a prompt is 2 * 6.98e9 operations a token and its attention."""
    spec = parse_config(json.loads((CONFIGS / "llama-3.1-8b.json").read_text()))
    plan = plan_gpu_memory(
        spec,
        EngineConfig(scheduler=SchedulerConfig(enforce_eager=True)),
        total_bytes=80 * GIB,
    )
    bounds = speed_bounds(spec, plan, GPUS["h100"])
    assert [bound.batch for bound in bounds.decode] == [1, 8, 64, 256]
    for bound in bounds.decode:
        num_bytes = 15.0098e9 + bound.batch * 1024 * 131_072
        assert bound.is_by_memory
        assert bound.tokens_per_second == pytest.approx(bound.batch * 3.35e12 / num_bytes, rel=1e-4)
    attention = 4 * 32 * 128 * 32 * 2049 / 2
    a_token = 2 * 6.9793e9 + attention + 2 * 0.5254e9 / 2048
    assert bounds.prefill_tokens_per_second == pytest.approx(989e12 / a_token, rel=1e-3)
    small = plan_gpu_memory(
        spec,
        EngineConfig(
            model=ModelConfig(max_model_len=2048), scheduler=SchedulerConfig(max_num_seqs=8)
        ),
        total_bytes=20 * GIB,
    )
    assert [bound.batch for bound in speed_bounds(spec, small, GPUS["l4"]).decode] == [1, 8]


def test_windows_bound_what_is_read() -> None:
    config = json.loads((CONFIGS / "llama-3.1-8b.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "sliding_window": 256}
    spec, wide = parse_config(config), parse_config({**config, "sliding_window": None})
    options = EngineConfig(scheduler=SchedulerConfig(enforce_eager=True))
    bounds = [
        speed_bounds(s, plan_gpu_memory(s, options, total_bytes=80 * GIB), GPUS["h100"])
        for s in (spec, wide)
    ]
    narrow, full = (bound.decode[-1].tokens_per_second for bound in bounds)
    assert narrow / full == pytest.approx(
        (15.0098e9 + 256 * 1024 * 131_072) / (15.0098e9 + 256 * 256 * 131_072), rel=1e-3
    )
    assert bounds[0].prefill_tokens_per_second > bounds[1].prefill_tokens_per_second


def test_a_hub_id_needs_no_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def download(repo_id: str, **options: Any) -> Path:
        asked.append((repo_id, options["revision"], options["with_weights"]))
        return folder

    monkeypatch.setattr(source, "download", download)
    found = planned(capsys, "some/model", "--revision", "abc", "--gpu", "l4")
    assert asked == [("some/model", "abc", False)]
    assert found["model"] == "some/model" and found["gpu"] == "l4"
    assert found["gpu_memory_bytes"] == 22 * GIB and found["bounds"]["decode"]


def test_a_gguf_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gguf import GGUFWriter

    path = folder / "tiny.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(40)])
    writer.add_token_merges([])
    writer.add_tensor("token_embd.weight", np.zeros((40, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # With a tokenizer of its own, none is made of the file.
    found = planned(capsys, str(path), "--gpu-memory", "1GiB", "--tokenizer", str(folder))
    assert found["max_model_len"] == 64
    layer = 4 * 32 * 32 + 3 * 64 * 32 + 2 * 32
    weights = {p["name"]: p["num_bytes"] for p in found["parts"]}
    named = [size for name, size in weights.items() if name.startswith("weights")]
    assert sum(named) == 2 * (40 * 32 + layer + 32) + 64 * 8 * 2 * 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --gpu-memory, such as 24GiB, or --gpu"),
        (["--gpu", "h100", "--device", "cpu"], "--device cpu has none"),
        (["--gpu-memory", "0"], "--gpu-memory must be at least 1"),
        (["--gpu-memory", "1GiB"], "1.00 GiB of GPU memory, 92% of which may be used, are too"),
        (["--gpu-memory", "8GiB", "--max-model-len", "50000"], "must be at most 40960"),
        (["--gpu-memory", "many"], "expected a whole number such as"),
        (["--gpu", "h1000"], "invalid choice: 'h1000'"),
    ],
)
def test_refusals_are_one_line(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["plan", str(folder), *words, *QUICK])
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        code = ended.code
    printed = capsys.readouterr()
    assert code == 2 and printed.out == ""
    assert message in printed.err and "Traceback" not in printed.err


def test_without_triton_it_says_what_to_install(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main(["plan", str(folder), "--gpu-memory", "8GiB", *QUICK]) == 2
    assert "octavo plan needs Triton: pip install 'octavo[gpu]'" in capsys.readouterr().err
