"""``octavo compile``: kernels of a model for a GPU that is not there, found again by a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import octavo
import octavo_kernels
from octavo.cli import main

pytest.importorskip("triton")

# All kernels take minutes, so one op stands for the rest. The start of a server is `warming.warm`,
# here for a GPU that is not there: kernels are made, not loaded.
SCRIPT = """
import contextlib, io, json, sys
from octavo_kernels import compile_count, device, op_runs, warming
warming.RUNS = {name: op_runs.RUNS[name] for name in ("rms_norm",)}
warming.batches = lambda: (op_runs.decode(1, 100),)
from octavo.cli import main

model, folder = sys.argv[1:]
codes, told = [], []
for _ in range(2):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        codes.append(main(["compile", model, "--arch", "sm_90", "--cache-dir", folder]))
    told.append(out.getvalue())

import torch, triton
from octavo.checkpoint import resolve
from octavo.config import ModelConfig
from octavo.platforms.gpu import model_shape
from octavo_kernels.launch import compiling_for

spec = resolve(ModelConfig(model=model, load_format="dummy")).spec
dtype = torch.bfloat16
shape = model_shape(spec, dtype=dtype, cache_dtype=dtype, block_size=16)
heard = []
triton.knobs.compilation.listener = lambda **news: heard.append(news["cache_hit"])
torch.cuda.is_available = lambda: True
def make(launch):
    launch.compile()
warming._load = make
warming.compile_all = None
before = compile_count.num_compiled()
with device.pretending((9, 0)), compiling_for(90):
    warmed = warming.warm(shape)
made = compile_count.num_compiled() - before
print(json.dumps({
    "codes": codes, "told": told, "warmed": len(warmed), "made": made, "hits": sum(heard),
}))
"""


def test_a_server_finds_what_was_compiled(model_dir: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    packages = (Path(octavo.__file__), Path(octavo_kernels.__file__))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(path.parents[1]) for path in packages)
    environment["OCTAVO_CACHE"] = str(tmp_path / "octavo")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model_dir), str(cache)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["codes"] == [0, 0]
    first, again = told["told"]
    number = told["warmed"]
    head = f"{model_dir}: {number} kernels for sm_90, bfloat16, cache bfloat16 in blocks of 16\n"
    assert first.startswith(head)
    assert f"{number} of them compiled in" in first and f"kept in {cache}" in first
    assert again == f"{head}all of them are in {cache}\n"
    assert told["made"] == told["hits"] == number > 1, "each from the cache, none compiled"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --arch"),
        (["--arch", "sm_75"], "invalid choice: 'sm_75' (choose from"),
        (["--arch", "sm_90", "--processes", "0"], "--processes must be at least 1, got 0"),
        (["--arch", "sm_90", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--arch", "sm_90", "--max-num-seqs", "8"], "unknown flag --max-num-seqs"),
        (["--arch", "sm_90", "--model", "other"], "two models were given"),
    ],
)
def test_what_is_wrong_is_said(
    words: list[str], message: str, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["compile", str(model_dir), *words])
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_interpreted_kernels_are_not_compiled(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["compile", str(model_dir), "--arch", "sm_90"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_a_model_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(["compile", str(tmp_path / "none"), "--arch", "sm_90"]) == 2
    assert "not found" in capsys.readouterr().err
