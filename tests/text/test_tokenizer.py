"""Our tokenizer against transformers' on the same files."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from octavo.text.tokenizer import Tokenizer
from tests.text.test_detokenizer import CORPUS, SPECIAL, byte_level, sentencepiece_like

TEXTS = ["", "Hello there", " 日本語 😀", "a<s>b</s> c", "  two  spaces\n\n", "naïve"]


def save(folder: Path, backend: Backend, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", [byte_level, sentencepiece_like])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("template", [False, True])
def test_as_transformers(tmp_path: Path, kind: Any, config: Any, template: bool) -> None:
    backend = kind()._backend
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    folder = save(tmp_path / "t", backend, eos_token="</s>", **config)
    ours, theirs = Tokenizer.from_dir(folder), AutoTokenizer.from_pretrained(str(folder))
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), (text, special)
            for skip in (True, False):
                told = ours.decode(ids, skip_special_tokens=skip)
                assert told == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(theirs)
    assert ours.named_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert ours.special_ids == {0, 1, 2, 3} and ours.is_added(3) and not ours.is_added(300)


def test_bytes_of_tokens() -> None:
    for tokenizer in (byte_level(), sentencepiece_like()):
        ids = tokenizer.encode("naïve 日本語 😀 hello")
        joined = b"".join(tokenizer.token_bytes(i) for i in ids)
        assert joined.decode().removeprefix(" ") == "naïve 日本語 😀 hello"
        assert tokenizer.token_text(3) == "<|im_start|>"


def test_long_texts_leave_the_loop() -> None:
    tokenizer = byte_level()
    text = "Hello world " * 2000

    async def both() -> tuple[list[int], int]:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        ids = await tokenizer.encode_async(text)
        counting.cancel()
        return ids, turns

    ids, turns = asyncio.run(both())
    assert ids == tokenizer.encode(text) and turns > 1


def test_a_folder_without_tokenizer_json(tmp_path: Path, monkeypatch: Any) -> None:
    """GPT-2's old files: converted through transformers, and kept."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "old"
    folder.mkdir()
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.model.save(str(folder))
    config = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>", "model_type": "gpt2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    first = Tokenizer.from_dir(folder)
    assert first.decode(first.encode("Hello there")) == "Hello there"
    assert first.folder is not None and first.folder.is_relative_to(tmp_path / "cache")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)  # not needed again
    assert Tokenizer.from_dir(folder).encode("Hello") == first.encode("Hello")


def test_unreadable_folders(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        Tokenizer.from_dir(tmp_path / "a")
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer.from_dir(tmp_path / "b")


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        byte_level().encode("a\udcff")
