"""Cold starts: other processes fill the cache, and nothing that they fail to do is missed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numba
import pytest
import torch

import octavo_kernels
from octavo_kernels import block_copy, machine_code, parallel, precompile, rms_norm, silu_mul
from octavo_kernels.parallel import Kernel

DTYPES = {"weight_dtype": torch.float32, "cache_dtype": torch.float32}


def few_kernels(**dtypes: torch.dtype) -> list[Kernel]:
    """Kernels that compile fast, as if never used."""
    ops = (*block_copy.kernels(), *rms_norm.kernels(), *silu_mul.kernels())
    return [Kernel(kernel._body) for kernel in ops]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache for this process; every amount of work is worth a few others."""
    place = tmp_path / "cache"
    monkeypatch.setattr(machine_code, "_directories", lambda: [place])
    monkeypatch.setattr(octavo_kernels, "kernels", few_kernels)
    monkeypatch.setattr(precompile, "_START_SECONDS", 0.0)
    before = parallel.num_threads()
    parallel.set_num_threads(2)
    yield place
    parallel.set_num_threads(before)


# The checkout's own cache may hold the kernels already.
PROGRAM = """
import sys
from pathlib import Path
from octavo_kernels import machine_code, precompile
machine_code._directories = lambda: [Path(sys.argv[1])]
precompile.main(sys.argv[2:])
"""


@pytest.fixture
def started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of every process that was started; all of them know one cache only."""
    calls: list[list[str]] = []
    root = str(Path(octavo_kernels.__file__).parents[1])

    def note(arguments: list[str]) -> subprocess.Popen[bytes]:
        calls.append(arguments)
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), *arguments],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": root},
        )

    monkeypatch.setattr(precompile, "_launch", note)
    return calls


def compiled_here(kernels: list[Kernel], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many of the kernels this process has to compile to have them all."""
    saved = []
    save = machine_code.MachineCodeCache.save_overload

    def note(self: machine_code.MachineCodeCache, sig: object, data: object) -> None:
        saved.append(sig)
        save(self, sig, data)

    with monkeypatch.context() as patch:
        patch.setattr(machine_code.MachineCodeCache, "save_overload", note)
        assert all(kernel.address for kernel in kernels)
    return len(saved)


def test_a_cold_cache_is_filled_and_then_only_loaded(
    folder: Path,
    started: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert not any(kernel.is_cached for kernel in few_kernels())
    with caplog.at_level(logging.INFO), precompile.precompiled(**DTYPES):
        pass
    assert "compiling CPU kernels for this machine, once: about" in caplog.text
    assert "ended early" not in caplog.text
    assert len(started) == 2
    names = [name for arguments in started for name in arguments[3:]]
    assert sorted(names) == sorted(kernel.name for kernel in few_kernels())
    assert all(kernel.is_cached for kernel in few_kernels())
    assert compiled_here(few_kernels(), monkeypatch) == 0
    started.clear()
    caplog.clear()
    with precompile.precompiled(**DTYPES):
        pass
    assert not started and not caplog.records


def test_processes_that_fail_are_harmless(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(arguments: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "exit(3)"], stdin=subprocess.PIPE)

    monkeypatch.setattr(precompile, "_launch", broken)
    with caplog.at_level(logging.INFO), precompile.precompiled(**DTYPES):
        pass
    assert caplog.text.count("ended early (exit code 3)") == 2
    kernels = few_kernels()[:1]
    assert compiled_here(kernels, monkeypatch) == 1


def test_processes_that_hang_or_cannot_start_are_harmless(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hanging: list[subprocess.Popen[bytes]] = []

    def first_hangs_second_fails(arguments: list[str]) -> subprocess.Popen[bytes]:
        if hanging:
            raise OSError("no more processes")
        hanging.append(subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE))
        return hanging[0]

    monkeypatch.setattr(precompile, "_launch", first_hangs_second_fails)
    monkeypatch.setattr(precompile, "_LONGEST_SECONDS", 0.0)
    with caplog.at_level(logging.INFO), precompile.precompiled(**DTYPES):
        pass
    assert hanging[0].returncode == -9
    assert "no more processes" in caplog.text and "exit code None" in caplog.text


def test_an_error_meanwhile_ends_the_processes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[subprocess.Popen[bytes]] = []

    def sleep(arguments: list[str]) -> subprocess.Popen[bytes]:
        running.append(subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE))
        return running[-1]

    monkeypatch.setattr(precompile, "_launch", sleep)
    with pytest.raises(ValueError, match="no such model"), precompile.precompiled(**DTYPES):
        raise ValueError("no such model")
    assert [process.returncode for process in running] == [-9, -9]


def test_nothing_is_started_for_one_thread_or_without_a_place(
    folder: Path,
    started: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    parallel.set_num_threads(1)
    with precompile.precompiled(**DTYPES):
        pass
    parallel.set_num_threads(2)
    blocked = folder.parent / "file"
    blocked.write_text("not a directory")
    monkeypatch.setattr(machine_code, "_directories", lambda: [blocked / "kernels"])
    with caplog.at_level(logging.INFO), precompile.precompiled(**DTYPES):
        pass
    assert not started and "at every start" in caplog.text


def test_a_process_ends_with_the_one_that_started_it(folder: Path) -> None:
    names = [kernel.name for kernel in octavo_kernels.kernels(**DTYPES)]
    process = precompile._launch(["float32", "float32", "", *names])
    assert process.stdin is not None
    process.stdin.close()  # what the system does when the parent is gone
    assert process.wait(30) == 3


@pytest.mark.parametrize("place", [0.0, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("ending", ["nbc", "nbi"])
def test_damaged_machine_code_is_compiled_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ending: str, place: float
) -> None:
    """A byte that changed on disk: LLVM would end the process when it reads some of them."""
    assert compiled_here(few_kernels()[:1], monkeypatch) == 1
    (file,) = folder.rglob(f"*.{ending}")
    code = bytearray(file.read_bytes())
    code[int(len(code) * place)] ^= 0xFF
    file.write_bytes(code)
    assert compiled_here(few_kernels()[:1], monkeypatch) == 1
    assert compiled_here(few_kernels()[:1], monkeypatch) == 0


@pytest.mark.parametrize("ending", ["nbc", "nbi"])
def test_machine_code_cut_short_is_compiled_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    assert compiled_here(few_kernels()[:1], monkeypatch) == 1
    (file,) = folder.rglob(f"*.{ending}")
    file.write_bytes(file.read_bytes()[:40])
    assert compiled_here(few_kernels()[:1], monkeypatch) == 1
    assert compiled_here(few_kernels()[:1], monkeypatch) == 0


def test_shares_are_balanced_longest_first() -> None:
    from octavo_kernels import matmul, paged_attention, sampling

    kernels = [
        *matmul.kernels(torch.bfloat16),
        *paged_attention.kernels(cache_dtype=torch.bfloat16),
        *sampling.kernels(),
        *few_kernels(),
    ]
    for count in (1, 2, 3, 50):
        shares = precompile._shares(kernels, count)
        assert len(shares) == min(count, len(kernels))
        assert sorted(k.name for s in shares for k in s) == sorted(k.name for k in kernels)
        for share in shares:
            lengths = [precompile._seconds(kernel) for kernel in share]
            assert lengths == sorted(lengths, reverse=True)
    first, second = (
        sum(map(precompile._seconds, share)) for share in precompile._shares(kernels, 2)
    )
    assert abs(first - second) < 1


def test_code_that_cannot_be_kept_is_only_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = numba.core.codegen.CPUCodeLibrary
    monkeypatch.setattr(library, "has_dynamic_globals", property(lambda self: True))
    kernel = few_kernels()[0]
    assert kernel.address and not list(folder.glob("*.nbc"))
    assert not few_kernels()[0].is_cached
