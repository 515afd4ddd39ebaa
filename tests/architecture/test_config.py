"""No dead options: each configuration field is read by code outside the configuration."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from octavo.config import CacheConfig, ModelConfig, SchedulerConfig, ServerConfig

SERVER = Path(__file__).resolve().parents[2] / "server" / "octavo"
ALL = [
    (cls, f.name)
    for cls in (ModelConfig, CacheConfig, SchedulerConfig, ServerConfig)
    for f in fields(cls)
]


@pytest.mark.parametrize(("cls", "name"), ALL, ids=lambda v: v if isinstance(v, str) else None)
def test_each_field_is_read(cls: type, name: str) -> None:
    pattern = re.compile(rf"\.{name}\b")
    readers = [
        path
        for path in SERVER.rglob("*.py")
        if path.name not in ("config.py", "flags.py") and pattern.search(path.read_text())
    ]
    assert readers, f"{cls.__name__}.{name} is accepted and ignored"


def test_each_field_has_help() -> None:
    for cls in (ModelConfig, CacheConfig, SchedulerConfig, ServerConfig):
        for f in fields(cls):
            assert f.metadata.get("help"), f"{cls.__name__}.{f.name} has no help text"
