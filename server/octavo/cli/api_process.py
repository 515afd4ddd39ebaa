"""One of the further HTTP processes of a server. Knows the descriptors it was born with.

python -m octavo.cli.api_process CHANNEL LISTENER
"""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Serves until told to end. Returns the exit code."""
    # Ctrl-C and service managers signal every process of a group: the first one decides.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel, listener = (socket.socket(fileno=int(argument)) for argument in arguments)
    # Lazy: it takes a third of a second and more; signals are safe by now.
    from octavo.cli.http_server import serve_child

    return serve_child(channel, listener)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
