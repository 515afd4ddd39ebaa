"""The engine process: builds the engine, then turns its loop until its parent is gone.

Knows messages and the engine core; how to compute is the core's business.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import traceback

import msgspec

from octavo.engine import ipc
from octavo.engine.launch import EngineArguments
from octavo.observability.logging import set_up_logging

log = logging.getLogger("octavo.engine")


def main(argument: str) -> int:
    """Runs the engine described by one JSON argument. Returns the exit code."""
    arguments = msgspec.json.decode(argument.encode(), type=EngineArguments)
    # Ctrl-C and service managers signal every process of a group. What that means is the parent's
    # decision: it lets running requests end, and this process ends with it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    set_up_logging(arguments.log_level)
    end = ipc.EngineEnd(arguments.addresses)
    try:
        return _run(arguments, end)
    finally:
        end.close()


def _end_with_parent() -> None:
    """Standard input is a pipe that the parent holds open and never writes to."""
    while os.read(0, 4096):
        pass
    os._exit(0)


def _run(arguments: EngineArguments, end: ipc.EngineEnd) -> int:
    try:
        # Lazy: torch takes over a second; the socket above is open and Ctrl-C is safe by now.
        from octavo.engine.build import build_engine

        core, info = build_engine(
            arguments.config,
            use_fake_executor=arguments.fake_executor,
            fake_device=arguments.fake_device,
        )
    except ValueError as error:
        end.send(ipc.Failed(message=str(error), is_user_error=True))
        return 2
    except Exception as error:
        log.error("the engine could not start\n%s", traceback.format_exc())
        end.send(ipc.Failed(message=f"{type(error).__name__}: {error}", is_user_error=False))
        return 1
    # What is loaded by now stays: no collection of garbage needs to look at it again, which takes
    # a tenth of a second, in the middle of a stream.
    gc.collect()
    gc.freeze()
    end.send(ipc.Ready(info))
    try:
        while True:
            is_idle = not core.has_work and not core.use_idle_time()
            for message in end.receive(wait=is_idle):
                if isinstance(message, ipc.AddRequests):
                    for request in message.requests:
                        core.add_request(request)
                else:
                    core.abort(message.request_ids)
            if core.has_work:
                end.send(ipc.Step(core.step()))
    except Exception as error:
        log.critical("the engine cannot go on\n%s", traceback.format_exc())
        end.send(ipc.Dead(f"the engine failed: {type(error).__name__}: {error}"))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
