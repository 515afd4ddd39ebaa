"""Options that several commands share: which model and engine. Knows the configuration only."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from octavo.compat import add_foreign_flags
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, ServerConfig
from octavo.flags import add_flags, flag_name, from_namespace, parse_float, parse_int

ENGINE_CONFIGS: tuple[type, ...] = (ModelConfig, CacheConfig, SchedulerConfig)
API_KEY_VARIABLES = ("OCTAVO_API_KEY", "VLLM_API_KEY")


def add_engine_flags(
    parser: argparse.ArgumentParser, *, also: Sequence[type] = (), skip: Sequence[str] = ()
) -> None:
    """Flags of the engine and of the configurations ``also``; vLLM's other flags are known too.

    ``skip``: fields for whose names the command has another use.
    """
    add_flags(parser, (*ENGINE_CONFIGS, *also), skip=skip)
    add_foreign_flags(parser)
    parser.add_argument("--fake-executor", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--fake-device", type=_three_floats, help=argparse.SUPPRESS)


def _three_floats(text: str) -> tuple[float, float, float]:
    one, two, three = map(parse_float, text.split(","))
    return one, two, three


def engine_config(args: argparse.Namespace, *, skip: Sequence[str] = ()) -> EngineConfig:
    """The engine's options from parsed flags, but for those named in ``skip``. Raises ValueError.

    A positional MODEL is ``args.positional_model``; it and ``--model`` may not differ.
    """
    args.model = positional_model(args)
    return EngineConfig(
        model=from_namespace(ModelConfig, args, skip=skip),
        cache=from_namespace(CacheConfig, args),
        scheduler=from_namespace(SchedulerConfig, args),
    )


def positional_model(args: argparse.Namespace) -> str:
    """The model that was named, in either of two ways; "" if none was. Raises ValueError."""
    positional: str | None = getattr(args, "positional_model", None)
    named: str | None = getattr(args, "model", None)
    if positional is not None and named not in (None, positional):
        raise ValueError(f"two models were given: {positional} and --model {named}")
    return positional or named or ""


def server_config(args: argparse.Namespace) -> ServerConfig:
    """The HTTP server's options from parsed flags and the environment. Raises ValueError."""
    if not hasattr(args, "api_key") and (key := environment_api_key()) is not None:
        args.api_key = [key]
    for name in ("api_key", "served_model_name"):
        given = getattr(args, name, None)
        if given is not None and not (given and all(given)):  # an unset shell variable
            raise ValueError(f"{flag_name(name)} must not be empty")
    if (path := getattr(args, "root_path", "")) and not path.startswith("/"):
        raise ValueError(f"--root-path must begin with /, got {path!r}")
    return from_namespace(ServerConfig, args)


def environment_api_key() -> str | None:
    """The key in OCTAVO_API_KEY or VLLM_API_KEY, if one is set."""
    for name in API_KEY_VARIABLES:
        if os.environ.get(name):
            return os.environ[name]
    return None


_SAMPLING: tuple[tuple[str, Callable[[str], Any], str], ...] = (
    ("max_tokens", parse_int, "most tokens to generate"),
    ("min_tokens", parse_int, "fewest tokens to generate"),
    ("temperature", parse_float, "0 always takes the most likely token; default the model's"),
    ("top_p", parse_float, "of the most likely tokens, those that make up this share"),
    ("top_k", parse_int, "so many of the most likely tokens; 0 is all"),
    ("min_p", parse_float, "tokens at least this likely, relative to the most likely"),
    ("presence_penalty", parse_float, "against tokens that have been generated"),
    ("frequency_penalty", parse_float, "against tokens, by how often they were generated"),
    ("repetition_penalty", parse_float, "against tokens of prompt and answer; 1 is none"),
    ("seed", parse_int, "the same seed gives the same answer"),
    ("n", parse_int, "answers per prompt"),
)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """How to choose tokens, for commands that generate."""
    group = parser.add_argument_group("sampling")
    for name, parse, text in _SAMPLING:
        group.add_argument(
            flag_name(name), type=parse, default=argparse.SUPPRESS, metavar="X", help=text
        )
    group.add_argument(
        "--stop", action="append", default=argparse.SUPPRESS, help="a text that ends the answer"
    )
    group.add_argument(
        "--ignore-eos", action="store_true", default=argparse.SUPPRESS, help="go on to --max-tokens"
    )


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling flags that were given, by the API's names."""
    names = [*(name for name, _, _ in _SAMPLING), "stop", "ignore_eos"]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `octavo.LLM` from parsed flags. Raises ValueError.

    ``--seed`` is not among them: commands that use this mean the answers' seed by it.
    """
    config = engine_config(args, skip=("seed",))
    options: dict[str, Any] = {}
    for part in (config.model, config.cache, config.scheduler):
        options |= {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    return options
