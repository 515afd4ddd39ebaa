"""Finds the tokenizer of a benchmark: for a folder, a .gguf file, or a Hugging Face id.

Knows where tokenizers are; downloads no weights for the sake of one.
"""

from __future__ import annotations

from pathlib import Path

from octavo.checkpoint.default_model import DEFAULT_MODEL_NAME
from octavo.checkpoint.source import resolve
from octavo.config import ModelConfig
from octavo.text.tokenizer import Tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """``name``: a model or a tokenizer; "" is the default model's. Raises ValueError."""
    path = Path(name)
    if name and (path / "tokenizer.json").is_file():
        return Tokenizer.from_dir(path)
    if name in ("", DEFAULT_MODEL_NAME):
        return Tokenizer.from_dir(resolve(ModelConfig()).tokenizer_dir)
    # Random weights need no file of weights, so none is fetched.
    is_file = path.is_file()
    try:
        files = resolve(ModelConfig(model=name, load_format="auto" if is_file else "dummy"))
    except ValueError as error:
        raise ValueError(f"no tokenizer of {name}: {error}; name one with --tokenizer") from None
    return Tokenizer.from_dir(files.tokenizer_dir)
