"""Command-line flags made from the fields of configuration dataclasses. Knows no option by name.

``max_num_seqs: int`` becomes ``--max-num-seqs N``, a bool ``--x`` and ``--no-x``, a tuple takes
several values, a Literal or ``choices`` metadata limits them; the help is the field's.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

Config = TypeVar("Config")

# Spellings taken from vLLM, beside the field's own.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "gpu_memory_utilization": ("--device-memory-utilization",),
    "quantization": ("-q",),
    "speculative_config": ("-sc",),
    "api_server_count": ("-asc",),
}

_SUFFIXES = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "K": 1024,
    "M": 1024**2,
    "G": 1024**3,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
    "TiB": 1024**4,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
}


class FlagParser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong; the usage of a server is a screenful."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n(see {self.prog} --help)\n")


def parse_int(text: str) -> int:
    """An integer, or one with a suffix: 8k is 8000, 8K is 8192, 2GiB, 1.5G. As vLLM reads them."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2] not in _SUFFIXES:
        raise argparse.ArgumentTypeError(
            f"expected a whole number such as 4096, 8k, 8K or 2GiB, got {text!r}"
        )
    value = float(match[1]) * _SUFFIXES[match[2]] if match[2] or "." in match[1] else int(match[1])
    if value != int(value):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(value)


def parse_int_or_auto(text: str) -> int | None:
    """As `parse_int`; ``auto`` and vLLM's ``-1`` leave the choice to the program."""
    return None if text in ("auto", "-1") else parse_int(text)


def parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def add_flags(
    parser: argparse.ArgumentParser, configs: Sequence[type], *, skip: Sequence[str] = ()
) -> None:
    """One group of flags per dataclass in `configs`; fields named in `skip` are left out."""
    for config in configs:
        title = config.__name__.removesuffix("Config").lower()
        group = parser.add_argument_group(title, description=config.__doc__)
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            if field.name not in skip:
                _add_flag(group, field, hints[field.name])


def _add_flag(group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    names = [flag_name(field.name), *ALIASES.get(field.name, ())]
    kind, choices, is_many = _kind_of(hint)
    choices = field.metadata.get("choices", choices)
    text = field.metadata.get("help", "")
    # Absent flags leave no trace, so that defaults live in the dataclass alone.
    common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    if kind is bool:
        group.add_argument(
            *names,
            action=argparse.BooleanOptionalAction,
            help=f"{text} (default {'on' if field.default else 'off'})".replace("%", "%%"),
            **common,
        )
        return
    if field.default not in (None, "", ()) and "default" not in text:
        shown: Any = field.default
        if is_many:
            shown = " ".join(shown)
        text = f"{text} (default {shown})"
    if is_many:
        common["nargs"] = "*"
    parse_whole = parse_int_or_auto if field.default is None else parse_int
    group.add_argument(
        *names,
        type={int: parse_whole, float: parse_float}.get(kind, str),
        choices=choices,
        metavar=None if choices else field.metadata.get("metavar", "X"),
        help=text.replace("%", "%%"),
        **common,
    )


def _kind_of(hint: Any) -> tuple[type, tuple[Any, ...] | None, bool]:
    """(scalar type, choices, takes several values) of a field's annotation."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return type(args[0]), args, False
    if origin in (types.UnionType, typing.Union):
        (inner,) = (a for a in args if a is not type(None))
        return _kind_of(inner)
    if origin is tuple:
        return args[0], None, True
    assert hint in (bool, int, float, str), hint
    return hint, None, False


def from_namespace(
    config: type[Config], namespace: argparse.Namespace, *, skip: Sequence[str] = ()
) -> Config:
    """A `config` from parsed flags; fields without a flag and those in `skip` keep their
    defaults. Raises ValueError."""
    assert dataclasses.is_dataclass(config)
    given = {
        field.name: getattr(namespace, field.name)
        for field in dataclasses.fields(config)
        if hasattr(namespace, field.name) and field.name not in skip
    }
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return typing.cast(Config, config(**values))


def known_flags(parser: argparse.ArgumentParser) -> list[str]:
    """Every long flag the parser has."""
    return sorted(
        name
        for action in parser._actions
        for name in action.option_strings
        if name.startswith("--")
    )
