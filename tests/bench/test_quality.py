"""The arithmetic of `benchmarks.quality`, and a run over a made-up model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import quality

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
}


def test_comparison() -> None:
    half, quarter = math.log(0.5), math.log(0.25)
    exact = quality.Scores(texts=((half, half), (quarter,)), tops=((1, 2), (3,)))
    other = quality.Scores(texts=((half, quarter), (quarter,)), tops=((1, 5), (3,)))
    assert exact.num_tokens == 3
    assert exact.perplexity == pytest.approx(2 ** (4 / 3))
    same = quality.compare(exact, exact)
    assert same == {"worse_percent": 0.0, "error_percent": 0.0, "same_top_percent": 100.0}
    found = quality.compare(other, exact)
    assert found["worse_percent"] == pytest.approx(100 * (2 ** (1 / 3) - 1), abs=1e-3)
    # Texts lost log 2 and nothing: deviation log 2 / sqrt 2, twice in quadrature, of 3 tokens.
    assert found["error_percent"] == pytest.approx(100 * math.log(2) / 3, abs=1e-3)
    assert found["same_top_percent"] == pytest.approx(66.67)


def test_texts(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n{"turns": ["b", "c"]}\n{"turns": ["d"]}\n')
    assert quality.read_texts(path) == ["a", "b", "d"]
    assert quality.read_texts(path, most=2) == ["a", "b"]
    path.write_text('{"text": "a"}\n{"turns": []}\n')
    with pytest.raises(ValueError, match="line 2: neither text nor turns"):
        quality.read_texts(path)


def test_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of random weights that take no fetching: every mode scores the same texts."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "texts.jsonl").write_text('{"text": "12 34 56 78"}\n{"text": "a few words"}\n')
    rows: list[dict[str, object]] = []
    monkeypatch.setattr(quality, "keep_row", lambda name, row: rows.append(row))
    original = quality.LLM
    monkeypatch.setattr(
        quality, "LLM", lambda model, **options: original(model, load_format="dummy", **options)
    )
    arguments = ["--prompts", str(tmp_path / "texts.jsonl"), "--model", str(tmp_path)]
    quality.main([*arguments, "--modes", "none,int8/float32", "--most-tokens", "6", "--write"])
    assert [row["quantization"] for row in rows] == ["none", "int8 (q8_64)"]
    assert [row["kv_cache_dtype"] for row in rows] == ["float32", "float32"]
    assert rows[0]["num_tokens"] == rows[1]["num_tokens"]
    assert rows[0]["worse_percent"] == 0 and rows[0]["perplexity"] > 1  # type: ignore[operator]
    assert len(capsys.readouterr().out.splitlines()) == 3
