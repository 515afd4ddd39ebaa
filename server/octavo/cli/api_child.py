"""Starts and ends one of the further HTTP processes. Knows its command line, not what it does.

The standard library only, as `octavo.engine.launch`: all processes of a server import side by side.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys


class ApiChild:
    """A further HTTP process from the first one's side. It ends itself when `channel` closes,
    which the system does however the first one ends."""

    def __init__(self, number: int, listener: socket.socket) -> None:
        """``listener``: bound, and the process's to listen on."""
        self.number = number
        self._listener = listener
        self.channel, theirs = socket.socketpair()
        descriptors = (theirs.fileno(), listener.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "octavo.cli.api_process", *map(str, descriptors)],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while the process lives; negative is the signal that killed it."""
        return self._process.poll()

    def stop_listening(self) -> None:
        """Refuses the connections that came for the process, which has ended: our copy of its
        socket still takes them. A Unix socket is everybody's, and goes on."""
        if self._listener.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):  # it had not begun to listen
                self._listener.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the process at once, if it has not ended."""
        self._process.kill()
        self._process.wait()
        self.channel.close()
