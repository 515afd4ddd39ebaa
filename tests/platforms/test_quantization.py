"""Which kind of blocks a matrix gets, and what `--quantization` comes to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from octavo.checkpoint import ModelFiles
from octavo.config import ModelConfig
from octavo.platforms.quantization import Quantization, choose, listed

Q4 = {"a": "Q4_1", "b": "Q4_1", "c": "Q8_0", "d": "Q6_K", "table": "Q8_0"}
FLOATS = {"a": "F16", "table": "F32"}


def chosen(types: Mapping[str, str], **options: Any) -> Quantization:
    files = ModelFiles(
        name="m.gguf",
        config={},
        generation_config={},
        weights=(),
        format="gguf" if types else "safetensors",
        tokenizer_dir=Path(),
        weight_types=types,
    )
    return choose(ModelConfig(**options), files=files)


@pytest.mark.parametrize(
    ("types", "options", "mode"),
    [
        (Q4, {}, "int8"),
        (Q4, {"quantization": "gguf"}, "gguf"),
        (FLOATS, {}, "int8"),
        ({}, {}, "int8"),
        ({"a": "Q6_K"}, {}, "int8"),
        (Q4, {"dtype": "float32"}, "none"),
        ({}, {"dtype": "bfloat16"}, "none"),
        (Q4, {"quantization": "none"}, "none"),
        (Q4, {"quantization": "int8"}, "int8"),
        (Q4, {"quantization": "gguf", "dtype": "float32"}, "gguf"),
        ({}, {"quantization": "int4"}, "int4"),
    ],
)
def test_mode(types: Mapping[str, str], options: dict[str, Any], mode: str) -> None:
    assert chosen(types, **options).mode == mode


@pytest.mark.parametrize(
    ("mode", "names", "kind"),
    [
        ("gguf", ["a", "b"], "q4_1"),
        ("gguf", ["c"], "q8_0"),
        ("gguf", ["a", "c"], "q8_0"),
        ("gguf", ["d"], "q8_0"),
        ("gguf", ["unknown"], "q8_0"),
        ("int8", ["a", "b"], "q8_64"),
        ("int8", ["c"], "q8_64"),
        ("int8", ["unknown"], "q8_64"),
        ("int4", ["a", "b"], "q4_1"),
        ("int4", ["c"], "q4_1"),
        ("none", ["a"], None),
    ],
)
def test_kind_of_a_stack(mode: Any, names: list[str], kind: str | None) -> None:
    quantization = Quantization(mode=mode, stored=Q4)
    assert quantization.kind(names) == kind
    assert kind is None or kind in quantization.kinds


def test_a_token_table_keeps_8_bits() -> None:
    wanted: dict[Any, str] = {"int8": "q8_64", "int4": "q8_0", "gguf": "q8_0"}
    for mode, kind in wanted.items():
        for stored in (Q4, {}):
            quantization = Quantization(mode=mode, stored=stored)
            assert quantization.kind(["table"], is_table=True) == kind
            assert kind in quantization.kinds
    small = {"table": "Q4_0"}
    assert Quantization(mode="gguf", stored=small).kind(["table"], is_table=True) == "q4_0"
    assert Quantization(mode="int8", stored=small).kind(["table"], is_table=True) == "q8_64"


def test_what_changed_is_told_where_it_was_to_stay() -> None:
    kept = Quantization(mode="gguf", stored=Q4)
    assert kept.changed(["a", "b"], kind="q4_1") == []
    assert kept.changed(["a", "c"], kind="q8_0") == ["a (Q4_1)"]
    assert Quantization(mode="int8", stored=Q4).changed(["a"], kind="q8_0") == []
    assert listed(["x", "y"]) == "x, y"
    assert listed(list("vwxyz")) == "v, w, x and 2 more"


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="int4 takes dtype auto or float32, got bfloat16"):
        chosen({}, quantization="int4", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"gguf needs a GGUF file with Q4_0, .* \(F16, F32\)"):
        chosen(FLOATS, quantization="gguf")
    with pytest.raises(ValueError, match=r"gguf needs .* \(safetensors\); there are auto, none"):
        chosen({}, quantization="gguf")
    with pytest.raises(ValueError, match="must be one of auto, none, int8, int4, gguf, got 'awq'"):
        ModelConfig(quantization="awq")  # type: ignore[arg-type]


def test_smaller_modes_keep_a_files_own_four_bits() -> None:
    assert Quantization(mode="int8", stored=Q4).smaller == ("gguf",)
    assert Quantization(mode="int8", stored={"a": "Q8_0"}).smaller == ("int4",)
    assert Quantization().smaller == ("int8", "int4")
    assert Quantization(mode="gguf", stored=Q4).smaller == ()
