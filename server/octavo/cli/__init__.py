"""The ``octavo`` command: finds the subcommand and runs it. Knows no option of any of them.

Heavy modules are imported by the subcommand that needs them, when it runs: ``octavo --help`` must
be quick, and ``octavo serve`` starts its engine process before it imports anything slow.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from octavo import __version__
from octavo.cli import bench, chat, compile, distill, generate, plan, serve
from octavo.compat import unknown_flag_message
from octavo.flags import FlagParser, known_flags


def build_parser() -> tuple[FlagParser, dict[str, FlagParser]]:
    """The whole command line, and the parser of each command by its name (``bench serve``)."""
    parser = FlagParser(
        prog="octavo", description="A high-throughput LLM inference server.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"octavo {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    parsers: dict[str, FlagParser] = {}
    for module in (serve, generate, chat, distill, plan, compile):
        name = module.__name__.rpartition(".")[2]
        parsers[name] = commands.add_parser(
            name, help=module.HELP, description=module.HELP, allow_abbrev=False
        )
        module.add_arguments(parsers[name])
        parsers[name].set_defaults(run=module.run, command=name)
    suite = commands.add_parser("bench", help=bench.HELP, description=bench.HELP)
    benches = suite.add_subparsers(metavar="BENCHMARK", required=True)
    for name, benchmark in bench.BENCHMARKS.items():
        child = benches.add_parser(
            name, help=benchmark.HELP, description=benchmark.HELP, allow_abbrev=False
        )
        benchmark.add_arguments(child)
        child.set_defaults(run=benchmark.run, command=f"bench {name}")
        parsers[f"bench {name}"] = child
    return parser, parsers


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 1 for what failed, 2 for what was asked wrongly.

    ``argv``: default the command line.
    """
    started = time.monotonic()
    parser, parsers = build_parser()
    args, unknown = parser.parse_known_args(argv)
    own = parsers[args.command]
    if unknown:
        own.error(unknown_flag_message(unknown[0], known_flags(own)))
    args.started = started
    for warning in getattr(args, "compat_warnings", []):
        print(f"octavo {args.command}: warning: {warning}", file=sys.stderr)
    try:
        code: int = args.run(args)
        return code
    except ValueError as error:  # wrong options or unreadable files; a traceback would not help
        print(f"octavo {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left; nothing more to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


__all__ = ["build_parser", "main"]
