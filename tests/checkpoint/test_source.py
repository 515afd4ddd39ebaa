"""Finding model files: every form a model may come in, and what is said when it does not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file
from tokenizers import Tokenizer

from octavo.checkpoint import resolve, source
from octavo.config import ModelConfig

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def folder(path: Path, *weights: str, config: dict[str, Any] | None = CONFIG) -> Path:
    path.mkdir(parents=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    for name in weights:
        if name.endswith(".safetensors"):
            save_file({"x": torch.zeros(2)}, path / name)
        else:
            (path / name).write_bytes(b"x")
    return path


def test_safetensors_folder(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "model.safetensors", "consolidated.safetensors")
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    files = resolve(ModelConfig(model=str(path)))
    assert files.format == "safetensors"
    assert files.weights == (path / "model.safetensors",)
    assert files.tokenizer_dir == path
    assert files.spec.eos_token_ids == (7, 8)
    assert files.name == str(path)


def test_sharded_folder_needs_every_part(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "a.safetensors", "stray.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names b\.safetensors, which is missing"):
        resolve(ModelConfig(model=str(path)))
    save_file({"y": torch.zeros(2)}, path / "b.safetensors")
    files = resolve(ModelConfig(model=str(path)))
    assert [p.name for p in files.weights] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        ((), None, "neither config.json nor a .gguf file"),
        ((), CONFIG, r"has no weights: looked for model\.safetensors\.index\.json"),
        (("pytorch_model.bin",), CONFIG, r"its \.bin files are pickles"),
        (("a.gguf", "b.gguf"), None, "must have one .gguf model, got a.gguf, b.gguf"),
        (("model.safetensors",), {**CONFIG, "architectures": ["GPT2LMHeadModel"]}, "known are Ll"),
    ],
)
def test_folders_that_cannot_be_served(
    tmp_path: Path, weights: tuple[str, ...], config: dict[str, Any] | None, message: str
) -> None:
    path = folder(tmp_path / "m", *weights, config=config)
    with pytest.raises(ValueError, match=message):
        _ = resolve(ModelConfig(model=str(path))).spec


def test_broken_config(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "model.safetensors")
    (path / "config.json").write_text("{nope")
    with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON"):
        resolve(ModelConfig(model=str(path)))
    (path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        resolve(ModelConfig(model=str(path)))


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "model", "m.gguf", "a/b/c"])
def test_missing_path(name: str) -> None:
    with pytest.raises(ValueError, match="not found: it is no local folder, no .gguf file and no"):
        resolve(ModelConfig(model=name))


def test_unreadable_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: .*File name too long"):
        resolve(ModelConfig(model="m" * 5000))
    path = folder(tmp_path / "m", "model.safetensors")
    (path / "config.json").unlink()
    (path / "config.json").mkdir()
    with pytest.raises(ValueError, match="neither config.json nor"):
        resolve(ModelConfig(model=str(path)))


def test_a_weights_file_is_not_a_model(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "model.safetensors")
    with pytest.raises(ValueError, match="name the folder that also holds config.json"):
        resolve(ModelConfig(model=str(path / "model.safetensors")))


def test_gguf_file_and_folder(tmp_path: Path, cache: Path, write_gguf: Callable[..., Path]) -> None:
    path = write_gguf(tmp_path / "m" / "tiny.gguf", {"tokenizer.chat_template": "{{ 1 }}"})
    files = resolve(ModelConfig(model=str(path)))
    assert files.format == "gguf" and files.weights == (path,)
    assert files.weight_types["model.embed_tokens.weight"] == "F32"
    dummy = resolve(ModelConfig(model=str(path), load_format="dummy"))
    assert (dummy.format, dummy.weights, dict(dummy.weight_types)) == ("dummy", (), {})
    spec = files.spec
    assert (spec.vocab_size, spec.hidden_size, spec.num_kv_heads, spec.head_dim) == (258, 32, 1, 16)
    assert spec.rope.theta == 5000.0 and spec.tie_word_embeddings
    assert spec.eos_token_ids == (0,)
    assert files.tokenizer_dir.is_relative_to(cache)
    tokenizer = Tokenizer.from_file(str(files.tokenizer_dir / "tokenizer.json"))
    assert tokenizer.encode("ab<|end|>").ids == [257, 0]
    settings = json.loads((files.tokenizer_dir / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ 1 }}" and settings["eos_token"] == "<|end|>"
    assert resolve(ModelConfig(model=str(path.parent))).weights == (path,)


def test_gguf_is_converted_once(
    tmp_path: Path,
    cache: Path,
    write_gguf: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    first = resolve(ModelConfig(model=str(path)))
    monkeypatch.setattr(source, "GGUFFile", None)  # a second parse would fail
    assert resolve(ModelConfig(model=str(path))) == first
    assert not [p for p in cache.rglob(".*") if p.is_dir()], "no work folder may be left"


def test_failed_conversion_leaves_nothing(
    tmp_path: Path, cache: Path, write_gguf: Callable[..., Path]
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", {"tokenizer.ggml.pre": "martian"})
    with pytest.raises(ValueError, match=r"tiny\.gguf: unknown GGUF .* 'martian'; known are"):
        resolve(ModelConfig(model=str(path)))
    assert not [p for p in cache.rglob("*") if p.is_dir() and p.name != "gguf"]
    other = folder(tmp_path / "tokenizer")
    files = resolve(ModelConfig(model=str(path), tokenizer=str(other)))
    assert files.tokenizer_dir == other


def test_read_only_cache(
    tmp_path: Path,
    cache: Path,
    write_gguf: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache.write_text("a file where the cache should be")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = resolve(ModelConfig(model=str(write_gguf(tmp_path / "tiny.gguf"))))
    assert files.tokenizer_dir.is_relative_to(tmp_path / f"octavo-{os.getuid()}")


def test_split_gguf(tmp_path: Path, cache: Path, write_gguf: Callable[..., Path]) -> None:
    first = write_gguf(tmp_path / "big-00001-of-00002.gguf")
    with pytest.raises(ValueError, match=r"one of 2 parts, and big-00002-of-00002\.gguf is missi"):
        resolve(ModelConfig(model=str(first)))
    second = write_gguf(tmp_path / "big-00002-of-00002.gguf")
    assert resolve(ModelConfig(model=str(tmp_path))).weights == (first, second)


def test_gguf_of_unknown_architecture(
    tmp_path: Path, cache: Path, write_gguf: Callable[..., Path]
) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"general.architecture": "mamba"})
    with pytest.raises(ValueError, match="unknown GGUF architecture 'mamba'; known are llama"):
        resolve(ModelConfig(model=str(path)))


def test_dummy_needs_config_alone(tmp_path: Path, cache: Path) -> None:
    path = folder(tmp_path / "m")
    files = resolve(ModelConfig(model=str(path), load_format="dummy"))
    assert files.format == "dummy" and files.weights == ()
    tokenizer = Tokenizer.from_file(str(files.tokenizer_dir / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 300
    text = "Grüße, 世界! 123"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert all(tokenizer.decode([i]) for i in range(300))


def test_hub_id_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="org/model is not in the local cache and the Hugging"):
        resolve(ModelConfig(model="org/model", download_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, "org/model at revision v2 is gated: accept its terms"),
        (errors.RevisionNotFoundError, "org/model at revision v2 does not exist"),
        (errors.RepositoryNotFoundError, "is not on the Hugging Face hub, or is private"),
        (errors.LocalEntryNotFoundError, "is not in the local cache and the Hugging Face hub"),
        (ConnectionError, "hub cannot be reached .ConnectionError.; offline, name a local"),
    ],
)
def test_hub_errors_are_told_apart(
    error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(repo_id: str, **_: Any) -> str:
        raise error.__new__(error, repo_id)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=message):
        resolve(ModelConfig(model="org/model", revision="v2"))


def test_hub_id_as_gguf() -> None:
    with pytest.raises(ValueError, match="takes a local .gguf file or a folder with one, got the"):
        resolve(ModelConfig(model="org/model", load_format="gguf"))


def test_hub_id_downloads_what_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = folder(tmp_path / "snapshot", "model.safetensors")
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    files = resolve(ModelConfig(model="org/model", revision="v2", download_dir="/d"))
    assert files.name == "org/model" and files.weights == (path / "model.safetensors",)
    assert calls[0]["repo_id"] == "org/model"
    assert (calls[0]["revision"], calls[0]["cache_dir"]) == ("v2", "/d")
    assert "*.safetensors" in calls[0]["allow_patterns"]
    resolve(ModelConfig(model="org/model", load_format="dummy"))
    assert "*.safetensors" not in calls[1]["allow_patterns"]
