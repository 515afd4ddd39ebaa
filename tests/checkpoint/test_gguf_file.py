"""Our GGUF header reader against the gguf package's, and on files cut short or scribbled over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.checkpoint.gguf_file import GGUFFile, fingerprint


def test_reads_what_the_gguf_package_reads(tmp_path: Path, write_gguf: Callable[..., Path]) -> None:
    path = write_gguf(
        tmp_path / "m.gguf",
        {"general.alignment": 64, "a.flags": [True, False], "a.floats": [0.5, -2.0], "a.on": True},
        {"odd.weight": np.arange(5, dtype=np.float32)},
    )
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert set(ours.metadata) == set(fields)
    for key, value in ours.metadata.items():
        assert np.array_equal(value, fields[key]), key
    assert set(ours.tensors) == {t.name for t in theirs.tensors}
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        raw = ours.rows(mine, start=0, stop=mine.num_rows)
        assert raw.tobytes() == tensor.data.tobytes()


def test_cut_anywhere_is_a_clear_error(tmp_path: Path, write_gguf: Callable[..., Path]) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 7, 20, *range(24, len(whole), 997), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            GGUFFile(cut)


def test_cut_in_the_data_names_the_tensor(tmp_path: Path, write_gguf: Callable[..., Path]) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    first_lost = list(GGUFFile(path).tensors.values())[-2]
    path.write_bytes(path.read_bytes()[: first_lost.offset + 5])
    with pytest.raises(ValueError, match=rf"truncated: tensor {first_lost.name} ends at byte"):
        GGUFFile(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="not a GGUF file"):
        GGUFFile(path)
    path.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(100))
    with pytest.raises(ValueError, match="version must be 2 or 3, got 9"):
        GGUFFile(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(edits=st.lists(st.tuples(st.integers(0, 7000), st.integers(0, 255)), max_size=6))
def test_scribbled_headers_never_crash(
    tmp_path: Path, write_gguf: Callable[..., Path], edits: list[tuple[int, int]]
) -> None:
    pristine = tmp_path / "pristine.gguf"
    if not pristine.exists():
        write_gguf(pristine)
    data = bytearray(pristine.read_bytes())
    for position, value in edits:
        data[position] = value
    path = tmp_path / "scribbled.gguf"
    path.write_bytes(data)
    try:
        file = GGUFFile(path)
    except ValueError as error:
        assert "scribbled.gguf" in str(error)
    else:
        for tensor in file.tensors.values():
            assert isinstance(tensor.name, str)


def test_unknown_tensor_type_is_named_when_asked_for(
    tmp_path: Path, write_gguf: Callable[..., Path]
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tensors={"x.weight": np.zeros(4, dtype=np.int8)})
    with pytest.raises(ValueError, match="tensor x.weight has GGUF type 24; known are F32"):
        _ = GGUFFile(path).tensors["x.weight"].quant_type


def test_fingerprint_follows_content(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"a" * 100)
    before = fingerprint(path)
    assert fingerprint(path) == before
    path.write_bytes(b"a" * 99 + b"b")
    assert fingerprint(path) != before
