"""The kernel pool and the machine-code cache: every part once, from any thread, on any disk."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from octavo_kernels import machine_code, num_threads, set_num_threads
from octavo_kernels.parallel import Kernel, kernel
from octavo_kernels.simd import get_i64, put_f32, put_i64


@kernel
def _count_part(part: int, num_parts: int, counts: int) -> None:
    put_i64(counts + 8 * part, get_i64(counts + 8 * part) + 1)


@kernel
def _mixed_args(part: int, num_parts: int, out: int, a: float, b: int, c: float) -> None:
    put_f32(out, a)
    put_i64(out + 8, b)
    put_f32(out + 16, c)


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = num_threads()
    yield
    if num_threads() != before:
        set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_part_runs_once(threads: int) -> None:
    set_num_threads(threads)
    for parts in (0, 1, 2, 7, 1000):
        counts = np.zeros(1001, np.int64)
        for _ in range(20):
            _count_part(parts, counts.ctypes.data)
        assert (counts[:parts] == 20).all() and not counts[parts:].any()


def test_several_python_threads_may_launch_at_once() -> None:
    tables = [np.zeros(16, np.int64) for _ in range(4)]

    def launch(table: np.ndarray) -> None:
        for _ in range(300):
            _count_part(16, table.ctypes.data)

    threads = [threading.Thread(target=launch, args=(table,)) for table in tables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((table == 300).all() for table in tables)


def test_arguments_keep_their_types() -> None:
    out = np.zeros(3, np.int64)
    _mixed_args(1, out.ctypes.data, 1.5, -7, 2.25)
    assert out.view(np.float32)[0] == 1.5 and out[1] == -7 and out.view(np.float32)[4] == 2.25
    out[:] = 0
    _mixed_args.run_held(out.ctypes.data, -1.5, 9, 0.25)
    assert out.view(np.float32)[0] == -1.5 and out[1] == 9 and out.view(np.float32)[4] == 0.25


def test_a_forked_child_gets_a_pool_of_its_own() -> None:
    counts = np.zeros(8, np.int64)
    _count_part(8, counts.ctypes.data)
    # In a process of its own: forking this one would copy pytest's and torch's threads.
    program = (
        "import os, sys\n"
        "import numpy as np\n"
        "from octavo_kernels.parallel import _nothing\n"
        "_nothing(8)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    _nothing(8)\n"
        "    os._exit(7)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    root = str(Path(machine_code.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
        env={**os.environ, "PYTHONPATH": root},
        timeout=60,
    )
    assert done.returncode == 7


def test_fewer_than_one_thread_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        set_num_threads(0)


def _run_fresh() -> None:
    """Compiles or loads `_count_part` under a new Kernel and runs it."""
    counts = np.zeros(4, np.int64)
    Kernel(_count_part._body)(4, counts.ctypes.data)
    assert (counts == 1).all()


def test_machine_code_is_kept_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "_directories", lambda: [tmp_path])
    _run_fresh()
    (entry,) = tmp_path.glob("*.nbc")
    before = entry.stat().st_mtime_ns
    _run_fresh()
    assert entry.stat().st_mtime_ns == before


def test_no_directory_or_a_torn_file_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    monkeypatch.setattr(
        machine_code, "_directories", lambda: [blocked / "kernels", tmp_path / "ok"]
    )
    _run_fresh()
    (entry,) = (tmp_path / "ok").glob("*.nbc")
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    _run_fresh()
    assert len(entry.read_bytes()) >= len(whole) // 2
    monkeypatch.setattr(machine_code, "_directories", lambda: [blocked / "kernels"])
    _run_fresh()


def test_code_kept_by_two_processes_is_not_mixed_up_in_a_third(tmp_path: Path) -> None:
    program = tmp_path / "factory.py"
    program.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from octavo_kernels import machine_code\n"
        "from octavo_kernels.parallel import device, kernel\n"
        "from octavo_kernels.simd import put_i64\n"
        f"machine_code._directories = lambda: [Path({str(tmp_path)!r})]\n"
        "def make(number):\n"
        "    @device\n"
        "    def inner(i):\n"
        "        total = 0\n"
        "        for j in range(i):\n"
        "            total += j * number\n"
        "        return total\n"
        "    def body(part: int, num_parts: int, out: int) -> None:\n"
        "        put_i64(out, inner(out % 2 + 4))\n"
        "    body.__name__ = f'body_{number}'\n"
        "    return kernel(body)\n"
        "for number in map(int, sys.argv[1:]):\n"
        "    out = np.zeros(1, np.int64)\n"
        "    make(number)(1, out.ctypes.data)\n"
        "    assert out[0] == 6 * number, (number, out[0])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(machine_code.__file__).parent.parent)}
    for numbers in (["3"], ["5"], ["3", "5"], ["5", "3"]):
        done = subprocess.run([sys.executable, str(program), *numbers], env=env, timeout=60)
        assert done.returncode == 0, numbers
    assert len(list(tmp_path.glob("*body_*.nbc"))) == 2
