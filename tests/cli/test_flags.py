"""Flags are the configuration's fields, all of them; vLLM's other flags are known."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import Any

import pytest

from octavo.cli import build_parser, main
from octavo.cli.options import engine_config, server_config
from octavo.cli.serve import _usual_count
from octavo.compat import FOREIGN_FLAGS, add_foreign_flags
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, ServerConfig
from octavo.flags import add_flags, flag_name, from_namespace, known_flags, parse_int

CONFIGS = (ModelConfig, CacheConfig, SchedulerConfig, ServerConfig)
# A value for each field that is not its default, as it is typed and as it is read.
VALUES: dict[str, tuple[list[str], Any]] = {
    "load_format": (["dummy"], "dummy"),
    "dtype": (["float16"], "float16"),
    "device": (["cuda"], "cuda"),
    "max_model_len": (["8K"], 8192),
    "generation_config": (["vllm"], "vllm"),
    "block_size": (["32"], 32),
    "kv_cache_dtype": (["bfloat16"], "bfloat16"),
    "kv_cache_memory_bytes": (["2GiB"], 2 * 2**30),
    "gpu_memory_utilization": (["0.5"], 0.5),
    "scheduling_policy": (["priority"], "priority"),
    "cudagraph_capture_sizes": (["4", "1", "1k"], (4, 1, 1000)),
    "uvicorn_log_level": (["debug"], "debug"),
    "max_body_bytes": (["1M"], 2**20),
    "quantization": (["int8"], "int8"),
    "speculative_config": (['{"method": "off"}'], '{"method": "off"}'),
}


def typed(name: str, default: Any, hint: str) -> tuple[list[str], Any]:
    """(command line, value read) that flips one field."""
    if name in VALUES:
        words, value = VALUES[name]
        return [flag_name(name), *words], value
    if isinstance(default, bool):
        return [flag_name(name).replace("--", "--no-") if default else flag_name(name)], not default
    if hint.startswith("tuple"):
        return [flag_name(name), "a", "b"], ("a", "b")
    if hint.startswith("float"):
        return [flag_name(name), "7.5"], 7.5
    if hint.startswith("int"):
        return [flag_name(name), "7"], 7
    return [flag_name(name), "some"], "some"


@pytest.mark.parametrize(
    ("config", "name"),
    [(c, f.name) for c in CONFIGS for f in fields(c)],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_every_field_has_a_flag_that_sets_it(config: type, name: str) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, CONFIGS)
    field = next(f for f in fields(config) if f.name == name)
    words, value = typed(name, field.default, str(field.type))
    read = from_namespace(config, parser.parse_args(words))
    assert value != field.default
    assert getattr(read, name) == value
    others = {f.name for f in fields(config)} - {name}
    untouched = config()
    assert all(getattr(read, n) == getattr(untouched, n) for n in others)


@pytest.mark.parametrize(
    ("text", "value"),
    [("4096", 4096), ("8k", 8000), ("8K", 8192), ("1.5k", 1500), ("2GiB", 2**31), ("1GB", 10**9)],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_int(text) == value


@pytest.mark.parametrize("text", ["", "x", "8q", "1.5", "1e3", "0x10", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_int(text)


def read(*words: str) -> tuple[EngineConfig, ServerConfig]:
    parser, _ = build_parser()
    args = parser.parse_args(["serve", *words])
    return engine_config(args), server_config(args)


def test_model_is_positional_or_named() -> None:
    assert read("org/name")[0].model.model == "org/name"
    assert read("--model", "org/name")[0].model.model == "org/name"
    assert read("same", "--model", "same")[0].model.model == "same"
    with pytest.raises(ValueError, match="two models"):
        read("one", "--model", "other")


def test_auto_context() -> None:
    for word in ("auto", "-1"):
        assert read("--max-model-len", word)[0].model.max_model_len is None


def test_api_keys_come_from_flags_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "theirs")
    assert read()[1].api_key == ("theirs",)
    monkeypatch.setenv("OCTAVO_API_KEY", "ours")
    assert read()[1].api_key == ("ours",)
    assert read("--api-key", "a", "b")[1].api_key == ("a", "b")


WRONG = [
    (["--port", "70000"], "port must be from 0 to 65535, got 70000"),
    (["--port", "x"], "expected a whole number such as 4096, 8k, 8K or 2GiB, got 'x'"),
    (["--block-size", "17"], "--block-size"),
    (["--max-num-seqs", "0"], "max_num_seqs must be from 1 to 65536, got 0"),
    (["--gpu-memory-utilization", "2"], "gpu_memory_utilization must be from 0.01 to 1.0"),
    (["--gpu-memory-utilization", "nan"], "gpu_memory_utilization must be from 0.01 to 1.0"),
    (["--dtype", "int8"], "invalid choice: 'int8'"),
    (["--max-num-seq", "4"], "unknown flag --max-num-seq; did you mean --max-num-seqs?"),
    (["--zzzzz"], "unknown flag --zzzzz"),
    (["one", "two"], "unexpected argument 'two'"),
    (["--tensor-parallel-size", "2"], "is not supported (only 1): the engine runs on one device"),
    (["-tp", "4"], "-tp is not supported"),
    (["-q", "awq"], "-q: invalid choice: 'awq'"),
    (["--enable-lora"], "there are no LoRA adapters"),
    (["--trust-remote-code"], "code of model repositories is never run"),
    (["--spec-method", "ngram"], "say it in --speculative-config"),
    (["--speculative-config", "{"], "speculative_config must be JSON"),
    (["-sc", "[]"], "speculative_config must be a JSON object, got '[]'"),
    (["-sc", '{"size": 1}'], "speculative_config has no key 'size'; there are method, model, "),
    (["-sc", '{"method": "eagle"}'], "draft_model, off, got 'eagle'"),
    (["-sc", '{"method": "draft_model"}'], "model"),
    (["-sc", '{"num_speculative_tokens": 0}'], "num_speculative_tokens must be from 1 to 64"),
    (
        ["-sc", '{"prompt_lookup_min": 6, "prompt_lookup_max": 4}'],
        "prompt_lookup_min must be at most prompt_lookup_max=4, got 6",
    ),
    (["--cudagraph-capture-sizes", "4", "0"], "whole numbers of at least 1, got 0"),
    (["--cudagraph-capture-sizes", "4", "x"], "expected a whole number"),
    (["--max-cudagraph-capture-size", "0"], "max_cudagraph_capture_size must be at least 1"),
    (
        ["--cudagraph-capture-sizes", "1", "8", "--max-cudagraph-capture-size", "4"],
        "the largest of cudagraph_capture_sizes (8) where both are given, got 4",
    ),
    (["--ssl-keyfile", "k"], "need --ssl-certfile"),
    (["--ssl-certfile", "/no/such"], "cannot use the TLS certificate and key /no/such"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda v: " ".join(v) if v else None)
def test_wrong_flags_are_one_line_and_exit_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["serve", *words])
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 2


def test_foreign_flags_are_harmless_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in FOREIGN_FLAGS:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        add_foreign_flags(parser)
        values = [] if flag.nargs == 0 else ["8"]
        if flag.is_refused:
            with pytest.raises(SystemExit):
                parser.parse_args([flag.name, *values])
            assert flag.reason in capsys.readouterr().err
            for value in flag.harmless:
                parser.parse_args([flag.name, value])
        else:
            args = parser.parse_args([flag.name, *values])
            assert args.compat_warnings == [f"{flag.name} has no effect: {flag.reason}"]


def test_foreign_flags_are_not_our_own() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, CONFIGS)
    assert not set(known_flags(parser)) & {flag.name for flag in FOREIGN_FLAGS}


def test_warnings_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["serve", "--performance-mode", "throughput", "--port", "70000"])
    assert code == 2
    assert "warning: --performance-mode has no effect" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("octavo 0.")


def test_configuration_survives_the_engine_argument() -> None:
    import dataclasses

    import msgspec

    from octavo.engine.launch import EngineArguments

    config, _ = read("m", "--max-model-len", "4096", "--no-async-scheduling")
    arguments = EngineArguments(config=config, addresses=("ipc://x",))
    text = json.dumps(dataclasses.asdict(arguments))
    assert msgspec.json.decode(text, type=EngineArguments) == arguments


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--api-key"], "--api-key must not be empty"),
        (["--api-key", ""], "--api-key must not be empty"),
        (["--served-model-name", "a", ""], "--served-model-name must not be empty"),
        (["--root-path", "octavo"], "--root-path must begin with /, got 'octavo'"),
    ],
)
def test_flags_left_empty(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(*flags)


def test_http_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("m", "-asc", "3")[1].api_server_count == 3
    monkeypatch.setattr("os.path.exists", lambda path: False)
    for cores, on_gpu in ((2, 1), (8, 1), (16, 2), (128, 4)):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, n=cores: set(range(n)))
        counts = [_usual_count(read("m", "--device", d)[0]) for d in ("cpu", "auto", "cuda")]
        assert counts == [1, 1, on_gpu]
