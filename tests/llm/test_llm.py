"""The offline engine: what it imports, what it answers, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from octavo.config import EngineConfig
from octavo.engine.build import build_engine
from octavo.engine.fake import fake_output
from octavo.engine.options import Defaults, GenerationOptions, SeedSource, choice_seed
from octavo.llm import LLM, engine_config
from octavo.types import EngineRequest, FinishReason, SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))

    def fake(config: EngineConfig) -> object:
        return build_engine(config, use_fake_executor=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("octavo.llm.build_engine", fake)
        return LLM(str(folder), load_format="dummy", max_model_len=256, check_kv_invariants=True)


def expected(llm: LLM, num_prompt: int, *, max_tokens: int, seed: int) -> list[int]:
    params = SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True)
    return fake_output(num_prompt, params, max_model_len=256, vocab_size=llm.info.vocab_size)


def test_needs_nothing_of_the_server() -> None:
    program = (
        "import sys\n"
        "for name in ('fastapi', 'starlette', 'uvicorn', 'pydantic', 'msgspec', 'zmq',\n"
        "             'aiohttp', 'prometheus_client', 'uvloop'):\n"
        "    sys.modules[name] = None\n"
        "import octavo\n"
        "octavo.LLM, octavo.SamplingParams\n"
        "import octavo.worker.worker\n"
    )
    roots = os.pathsep.join(path for path in sys.path if path)
    subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": roots},
        check=True,
        timeout=120,
    )


def test_prompts_of_every_kind(llm: LLM) -> None:
    (one,) = llm.generate([5, 6, 7], max_tokens=4, seed=3, ignore_eos=True)
    assert one.prompt is None
    assert one.prompt_token_ids == (5, 6, 7)
    assert list(one.token_ids) == expected(llm, 3, max_tokens=4, seed=3)
    assert one.finish_reason is FinishReason.LENGTH
    (text,) = llm.generate("abc", max_tokens=2)
    assert (text.prompt, len(text.token_ids)) == ("abc", 2)
    many = llm.generate([[1, 2], "abc", [3]], {"max_tokens": 3, "seed": 1, "ignore_eos": True})
    assert [len(g.token_ids) for g in many] == [3, 3, 3]
    assert list(many[2].token_ids) == expected(llm, 1, max_tokens=3, seed=1)


def test_options_per_prompt(llm: LLM) -> None:
    answers = llm.generate([[1], [2]], [{"max_tokens": 2}, SamplingParams(max_tokens=3)])
    assert [len(a.token_ids) for a in answers] == [2, 3]
    with pytest.raises(ValueError, match="2 prompts and 1 params"):
        llm.generate([[1], [2]], [None])


def test_n_draws_different_answers(llm: LLM) -> None:
    (answer,) = llm.generate([5] * 20, n=3, seed=9, max_tokens=5, ignore_eos=True)
    assert [o.index for o in answer.outputs] == [0, 1, 2]
    for i, output in enumerate(answer.outputs):
        assert list(output.token_ids) == expected(llm, 20, max_tokens=5, seed=choice_seed(9, i))


def test_logprobs(llm: LLM) -> None:
    (answer,) = llm.generate([1, 2, 3], max_tokens=4, logprobs=2, prompt_logprobs=1)
    assert [p.token_id for p in answer.logprobs] == list(answer.token_ids)
    assert [p.token_id for p in answer.prompt_logprobs or ()] == [2, 3]


def test_stream_can_be_left(llm: LLM) -> None:
    deltas = llm.stream([1, 2, 3], max_tokens=5, seed=2, ignore_eos=True)
    tokens = [t for delta in deltas for t in delta.token_ids]
    assert tokens == expected(llm, 3, max_tokens=5, seed=2)
    stream = llm.stream([1, 2, 3], ignore_eos=True)
    next(stream)
    stream.close()
    (after,) = llm.generate([1, 2, 3], max_tokens=5, seed=2, ignore_eos=True)
    assert list(after.token_ids) == tokens


def test_a_stop_string_ends_it(llm: LLM) -> None:
    tokens = expected(llm, 1, max_tokens=40, seed=4)
    text = llm.tokenizer.decode(tokens)
    word = text[len(text) // 2 :][:3]
    assert len(word) == 3
    (answer,) = llm.generate([1], max_tokens=200, seed=4, ignore_eos=True, stop=word)
    assert answer.finish_reason is FinishReason.STOP
    assert answer.outputs[0].stop_reason == word
    assert answer.text == text[: text.index(word)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_token": 3}, "unknown option 'max_token'; did you mean max_tokens?"),
        ({"temperature": 9}, "temperature must be a number from 0 to 2, got 9"),
        ({"temperature": float("nan")}, "temperature must be a number from 0 to 2, got nan"),
        ({"top_p": "x"}, "top_p must be a number from 0 to 1, got 'x'"),
        ({"n": 0}, "n must be a whole number from 1 to 128, got 0"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number"),
        ({"max_tokens": 1000}, "more than the context of 256"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens must be at most max_tokens=3, got 4"),
        ({"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 1}, "leaves no token"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty must be a number from 0.001"),
        ({"allowed_token_ids": []}, "allowed_token_ids must hold at least 1 token id"),
        ({"stop": [""]}, "stop must hold non-empty texts"),
        ({"logprobs": 99}, "logprobs must be a whole number from 0 to 20, got 99"),
        (
            {"stop_token_ids": [10**6]},
            "stop_token_ids: token ids must be from 0 to 511, got 1000000",
        ),
        ({"logit_bias": {1: 500}}, "logit_bias: a bias must be a number from -100 to 100"),
    ],
)
def test_wrong_options(llm: LLM, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        llm.generate([1, 2], **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "a prompt is empty"),
        ([1] * 300, "a prompt has 300 tokens, more than the context of 256"),
        ([-1], "a prompt: token ids must be from 0"),
        ([10**7], "a prompt: token ids must be from 0"),
    ],
)
def test_wrong_prompts(llm: LLM, prompt: str | list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt)
    assert len(llm.generate([1], max_tokens=1)) == 1


def test_no_chat_template(llm: LLM) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}])


def test_engine_options() -> None:
    config = engine_config("m", {"block_size": 32, "max_num_seqs": 8, "dtype": "float16"})
    assert (config.model.model, config.cache.block_size) == ("m", 32)
    with pytest.raises(ValueError, match="unknown option 'blocksize'; did you mean block_size?"):
        engine_config("m", {"blocksize": 32})
    with pytest.raises(ValueError, match="block_size must be one of"):
        engine_config("m", {"block_size": 33})


def test_the_engines_seed_is_that_of_requests_without_one(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(seed: int) -> list[str]:
        monkeypatch.setattr(llm, "_seeds", SeedSource(seed))
        return [llm.generate([5, 6], max_tokens=8, ignore_eos=True)[0].text for _ in range(2)]

    assert answers(7) == answers(7)
    assert len({*answers(7), *answers(8)}) == 4


def test_defaults_of_the_model() -> None:
    found = {"temperature": 0.6, "top_k": None, "presence_penalty": 1, "eos_token_id": 2}
    assert Defaults.from_generation_config(found) == Defaults(temperature=0.6, presence_penalty=1)
    for wrong in ({"temperature": "warm"}, {"top_p": 3}, {"top_k": True}, {"max_new_tokens": -1}):
        with pytest.raises(ValueError, match="generation_config.json: "):
            Defaults.from_generation_config(wrong)


def test_options_default_to_the_models() -> None:
    assert GenerationOptions().temperature is None
    assert GenerationOptions(stop="x").text_params().stop == ("x",)


def test_streams_and_calls_may_interleave(llm: LLM) -> None:
    first = llm.stream([5, 6, 7], max_tokens=12, seed=3, ignore_eos=True)
    second = llm.stream([5, 6], max_tokens=20, seed=4, ignore_eos=True)
    got: list[int] = [*next(first).token_ids]
    others: list[int] = [*next(second).token_ids]
    got += next(first).token_ids
    (between,) = llm.generate([9], max_tokens=16, seed=5, ignore_eos=True)
    assert list(between.token_ids) == expected(llm, 1, max_tokens=16, seed=5)
    for delta in second:
        others += delta.token_ids
    for delta in first:
        got += delta.token_ids
    assert got == expected(llm, 3, max_tokens=12, seed=3)
    assert others == expected(llm, 2, max_tokens=20, seed=4)


def test_an_interrupted_call_leaves_a_usable_engine(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = llm._core._executor
    collect = type(executor).collect
    num_left = 3
    # Whoever starts the tests in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def collect_and_interrupt(self: object) -> object:
        nonlocal num_left
        num_left -= 1
        if num_left == 0:
            signal.raise_signal(signal.SIGINT)
        return collect(executor)

    monkeypatch.setattr(type(executor), "collect", collect_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6, 7]] * 4, max_tokens=30)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (after,) = llm.generate([5, 6, 7], max_tokens=4, seed=3, ignore_eos=True)
    assert list(after.token_ids) == expected(llm, 3, max_tokens=4, seed=3)
    assert not llm._live and llm._core.scheduler.num_unfinished == 0


def test_a_call_that_is_interrupted_as_it_starts_leaves_nothing_running(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = llm._core.add_request

    def add_one(request: EngineRequest) -> None:
        if llm._core.scheduler.num_unfinished:
            raise KeyboardInterrupt
        add(request)

    monkeypatch.setattr(llm._core, "add_request", add_one)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5], [6]], max_tokens=9)
    assert not llm._live and llm._core.scheduler.num_unfinished == 0
