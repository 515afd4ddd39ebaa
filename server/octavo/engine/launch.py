"""Starts and ends the engine process. Knows its command line, not what it does.

The standard library only, so that ``octavo serve`` can start the engine before it imports
anything that takes time: both processes then import and load side by side.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile

from octavo.config import EngineConfig

_LONGEST_SOCKET_PATH = 100  # sun_path holds 104 to 108 bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineArguments:
    """All that the engine process is told: one JSON argument."""

    config: EngineConfig
    addresses: tuple[str, ...]  # of the front ends' sockets
    fake_executor: bool = False  # tests: a made-up model, no torch
    fake_device: tuple[float, float, float] | None = None  # us a step, and per row, per token
    log_level: str = "info"


class EngineProcess:
    """The engine process from its parent's side.

    Its standard input is a pipe that nobody writes to: the process ends itself when the pipe
    closes, which the system does however the parent ends.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_front_ends: int = 1,
        fake_executor: bool = False,
        fake_device: tuple[float, float, float] | None = None,
        log_level: str = "info",
    ) -> None:
        self.folder = _private_folder()  # for what the server's processes share; goes with us
        self.addresses = tuple(f"ipc://{self.folder}/engine{i}" for i in range(num_front_ends))
        arguments = EngineArguments(
            config=config,
            addresses=self.addresses,
            fake_executor=fake_executor,
            fake_device=fake_device,
            log_level=log_level,
        )
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "octavo.engine.process",
                json.dumps(dataclasses.asdict(arguments)),
            ],
            stdin=subprocess.PIPE,
            env=_environment(),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while the process lives; negative is the signal that killed it."""
        return self._process.poll()

    @property
    def exit_words(self) -> str:
        """How it ended, for people."""
        code = self.exit_code
        if code is None:
            return "it still runs"
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def close(self, *, timeout: float = 5.0) -> None:
        """Waits `timeout` seconds for the process to leave by itself, then kills it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _private_folder() -> str:
    folder = tempfile.mkdtemp(prefix="octavo-")
    if len(folder) > _LONGEST_SOCKET_PATH:  # a deep TMPDIR
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="octavo-", dir="/tmp")
    return folder


def _environment() -> dict[str, str]:
    """The parent's, with the packages' roots importable: the parent may run a source tree."""
    roots = [path for path in sys.path if path and os.path.isdir(os.path.join(path, "octavo"))]
    kernels = [path for path in sys.path if os.path.isdir(os.path.join(path, "octavo_kernels"))]
    inherited = os.environ.get("PYTHONPATH")
    paths = dict.fromkeys([*roots, *kernels, *([inherited] if inherited else [])])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
