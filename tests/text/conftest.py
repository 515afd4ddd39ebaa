"""The default model's own tokenizer."""

from __future__ import annotations

import pytest

from octavo.checkpoint.source import resolve
from octavo.config import ModelConfig
from octavo.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    return Tokenizer.from_dir(resolve(ModelConfig()).tokenizer_dir)
