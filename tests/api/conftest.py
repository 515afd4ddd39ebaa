"""One server per test file; each test finds it as new."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from octavo.config import ModelConfig
from octavo.text.tokenizer import Tokenizer
from tests.api.serving import ScriptedEngine, Server, serving, small_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def running(tokenizer: Tokenizer) -> Iterator[Server]:
    with serving(tokenizer=tokenizer, model=ModelConfig(model="org/tiny")) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    engine = running.engine
    fresh = ScriptedEngine(vocab_size=engine.info.vocab_size)
    info = engine.info
    engine.__dict__.update(fresh.__dict__)
    engine.info = info
    return running


@pytest.fixture
def engine(server: Server) -> ScriptedEngine:
    return server.engine


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client
