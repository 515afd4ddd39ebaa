"""Measures launch choices on this GPU and keeps the best in `tuned/<kind>.json`; knows no op.

    python -m octavo_kernels.tune [--op NAME ...] [--key TEXT] [--seconds N] [--out FILE]

Candidates come from every `<op>/tunable.py`. Those that do not compile or launch, and those whose
bits differ from the first one's, are dropped: a choice may never change bits. Entries that are not
measured stay as they were. Without a GPU, `--compile 90` only compiles all candidates and says
which fail.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from octavo_kernels import device
from octavo_kernels.benchmarking import Captured, Timing, timings
from octavo_kernels.compiling import compile_all
from octavo_kernels.launch import Launch, collecting
from octavo_kernels.testing import same_bits
from octavo_kernels.tuning import Choice, Tunable, gpu_kind

_TABLES = Path(__file__).parent / "tuned"
_CHUNK = 400  # candidates that are compiled together
_FINALISTS = 4
_FIRST_S, _FINAL_S = 0.02, 0.25  # replays of one candidate, of all finalists of a key
_L2_TIMES = 8  # rotated inputs are this much larger than the L2 cache


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What became of one choice for one key."""

    op: str
    key: str
    choice: dict[str, int]
    timing: Timing | None = None
    dropped: str = ""  # why


def tunables(names: Sequence[str] = ()) -> list[Tunable]:
    """The TUNABLES of every `<op>/tunable.py`, or those called `names`.

    Raises ValueError for an unknown name.
    """
    found: list[Tunable] = []
    for path in sorted(Path(__file__).parent.glob("*/tunable.py")):
        found += importlib.import_module(f"{__package__}.{path.parent.name}.tunable").TUNABLES
    known = {tunable.op for tunable in found}
    if unknown := set(names) - known:
        raise ValueError(f"nothing to tune in {sorted(unknown)}; there is {sorted(known)}")
    return [tunable for tunable in found if not names or tunable.op in names]


class OnMeta(TorchFunctionMode):
    """Puts every new tensor on the device "meta", whatever its maker asks for."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _device_constructors():
            kwargs.pop("generator", None)
            kwargs.pop("pin_memory", None)
            kwargs["device"] = "meta"
        elif func in (Tensor.cuda, Tensor.cpu):
            return args[0]
        elif func is Tensor.to:
            args = tuple(a for a in args if not isinstance(a, str | torch.device))
            kwargs.pop("device", None)
            if len(args) == 1 and not kwargs:
                return args[0]
        else:
            kwargs.pop("generator", None)
        return func(*args, **kwargs)


def launches_of(tunable: Tunable, key: str, choice: Choice) -> list[Launch]:
    """What one candidate launches, without a device."""
    with collecting() as found, OnMeta():
        tunable.make(key, choice)()
    return found


def compile_candidates(
    todo: Sequence[tuple[Tunable, str, Choice]],
    *,
    capability: int,
    seconds: float,
    processes: int | None = None,
) -> list[Trial]:
    """Fills the disk cache, several processes at once; the candidates that cannot be compiled."""
    owners: list[tuple[Tunable, str, Choice]] = []
    launches: list[Launch] = []
    seen: set[Any] = set()
    dropped = []
    for tunable, key, choice in todo:
        try:
            found = launches_of(tunable, key, choice)
        except ValueError as error:
            dropped.append(_trial(tunable, key, choice, dropped=f"refused: {error}"))
            continue
        new = {launch.key: launch for launch in found if launch.key not in seen}
        seen |= set(new)
        owners += [(tunable, key, choice)] * len(new)
        launches += new.values()
    failed = compile_all(launches, capability=capability, seconds=seconds, processes=processes)
    for index, why in failed.items():
        dropped.append(_trial(*owners[index], dropped=why))
    return dropped


def _trial(tunable: Tunable, key: str, choice: Choice, **fields: Any) -> Trial:
    return Trial(op=tunable.op, key=key, choice=dict(choice), **fields)


def _input_sets(tunable: Tunable, key: str, choice: Choice) -> list[Callable[[], Any]]:
    """Calls on up to `rotate` input sets, until they are too large for L2 together."""
    enough = _L2_TIMES * torch.cuda.get_device_properties().L2_cache_size
    before = torch.cuda.memory_allocated()
    calls: list[Callable[[], Any]] = []
    while len(calls) < tunable.rotate:
        torch.manual_seed(len(calls))
        calls.append(tunable.make(key, choice))
        if torch.cuda.memory_allocated() - before > enough:
            break
    return calls


def _results(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.clone()]
    return [v for item in value or () for v in _results(item)] if _is_many(value) else []


def _is_many(value: Any) -> bool:
    return isinstance(value, list | tuple)


def measure(tunable: Tunable, key: str, choices: Iterable[Choice]) -> list[Trial]:
    """Times choices for one key on the GPU, each alone, then the fastest few in turn."""
    trials: list[Trial] = []
    expected: list[Tensor] | None = None
    for choice in choices:
        try:
            calls = _input_sets(tunable, key, choice)
            results = _results(calls[0]())
            torch.cuda.synchronize()
            if expected is None:
                expected = results
            elif not all(map(same_bits, results, expected)):
                trials.append(_trial(tunable, key, choice, dropped="bits differ from the first"))
                continue
            timing = timings({"first": Captured(calls)}, seconds=_FIRST_S)[0]
            trials.append(_trial(tunable, key, choice, timing=timing))
        # A choice that the GPU refuses (too much shared memory, say) is dropped, not fatal.
        except Exception as error:
            _raise_if_broken(error)
            why = f"{type(error).__name__}: {error}"[:500]
            trials.append(_trial(tunable, key, choice, dropped=why))
        finally:
            calls = []
    trials = _finals(tunable, key, trials)
    torch.cuda.empty_cache()  # every graph had a pool of its own
    return trials


def _raise_if_broken(error: Exception) -> None:
    """After an illegal access nothing more runs in this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as broken:
        raise broken from error


def _finals(tunable: Tunable, key: str, trials: list[Trial]) -> list[Trial]:
    """The fastest few, alive at once and replayed in turn: the clock's drift is shared."""
    order = sorted(
        (i for i, trial in enumerate(trials) if trial.timing is not None),
        key=lambda i: trials[i].timing.median_s,  # type: ignore[union-attr]
    )[:_FINALISTS]
    try:
        graphs = {str(i): Captured(_input_sets(tunable, key, trials[i].choice)) for i in order}
        for timing in timings(graphs, seconds=_FINAL_S):
            index = int(timing.contender)
            trials[index] = dataclasses.replace(
                trials[index], timing=dataclasses.replace(timing, contender="final")
            )
    except torch.OutOfMemoryError:
        pass  # the first timings stand
    return trials


def best(trials: Iterable[Trial]) -> dict[str, dict[str, dict[str, int]]]:
    """The fastest choice by op and key; finalists win over those that were not."""
    found: dict[tuple[str, str], Trial] = {}
    for trial in trials:
        place = trial.op, trial.key
        if trial.timing is not None and (place not in found or _rank(trial) < _rank(found[place])):
            found[place] = trial
    choices: dict[str, dict[str, dict[str, int]]] = {}
    for (op, key), trial in found.items():
        choices.setdefault(op, {})[key] = trial.choice
    return choices


def _rank(trial: Trial) -> tuple[bool, float]:
    assert trial.timing is not None
    return trial.timing.contender != "final", trial.timing.median_s


def merged(
    old: dict[str, Any], choices: dict[str, dict[str, dict[str, int]]], about: dict[str, Any]
) -> dict[str, Any]:
    """A table with new choices over the old ones, everything in alphabetical order."""
    kept = old.get("choices", {})
    ops = sorted({*kept, *choices})
    joined = {op: dict(sorted({**kept.get(op, {}), **choices.get(op, {})}.items())) for op in ops}
    return {**about, "choices": joined}


def passport() -> dict[str, Any]:
    """What a table was measured with."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"gpu": gpu, "versions": versions, "commit": _commit()}


def _commit() -> str:
    """OCTAVO_COMMIT, else git's answer: the tree may travel without its history."""
    if "OCTAVO_COMMIT" in os.environ:
        return os.environ["OCTAVO_COMMIT"]
    command = ["git", "rev-parse", "--short=10", "HEAD"]
    try:
        done = subprocess.run(command, cwd=_TABLES.parent, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.decode().strip()


def write_table(path: Path, trials: Iterable[Trial]) -> None:
    """Merges the best choices into the table at path, whole or not at all."""
    old = json.loads(path.read_text()) if path.exists() else {}
    table = merged(old, best(trials), passport())
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(table, indent=1) + "\n")
    part.replace(path)


def _log(path: Path, trials: Iterable[Trial]) -> None:
    with path.open("a") as file:
        for trial in trials:
            file.write(json.dumps(dataclasses.asdict(trial)) + "\n")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _say_result(trials: Sequence[Trial], default: Choice) -> None:
    timed = [trial for trial in trials if trial.timing is not None]
    name = f"{trials[0].op} {trials[0].key}" if trials else "?"
    if not timed:
        _say(f"{name}: none of {len(trials)} ran: {trials[0].dropped if trials else ''}")
        return
    first = next((t for t in timed if t.choice == dict(default)), None)
    winner = min(timed, key=_rank)
    assert winner.timing is not None
    was = f"{first.timing.median_s * 1e6:.1f}" if first and first.timing else "-"
    _say(
        f"{name}: {winner.timing.median_s * 1e6:.1f} us (default {was}), {len(timed)} of"
        f" {len(trials)} ran: {json.dumps(winner.choice)}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m octavo_kernels.tune")
    parser.add_argument("--op", nargs="*", default=(), help="only these")
    parser.add_argument("--key", default="", help="only keys that contain this")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after about so long")
    parser.add_argument("--out", type=Path, help="the table (default: tuned/<kind>.json)")
    parser.add_argument("--log", type=Path, help="every timing, one JSON object a line")
    parser.add_argument("--compile", type=int, metavar="CAPABILITY", help="only compile")
    return parser


def chunks(todo: Sequence[tuple[Tunable, str]]) -> list[list[tuple[Tunable, str]]]:
    """Keys in order, in groups of about as many candidates as are worth a round of processes."""
    found: list[list[tuple[Tunable, str]]] = []
    size = _CHUNK
    for tunable, key in todo:
        if size >= _CHUNK:
            found.append([])
            size = 0
        found[-1].append((tunable, key))
        size += len(list(tunable.candidates(key)))
    return found


def _compile_chunk(chunk: Sequence[tuple[Tunable, str]], deadline: float) -> list[Trial]:
    """The dropped candidates of a chunk; two cores are left to whoever measures meanwhile."""
    major, minor = device.capability()
    return compile_candidates(
        [(tunable, key, choice) for tunable, key in chunk for choice in tunable.candidates(key)],
        capability=10 * major + minor,
        processes=max(1, len(os.sched_getaffinity(0)) - 2),
        seconds=deadline - time.monotonic(),
    )


def _tune(todo: Sequence[tuple[Tunable, str]], arguments: argparse.Namespace) -> int:
    deadline = time.monotonic() + arguments.seconds
    out = arguments.out or _TABLES / f"{gpu_kind()}.json"
    late = 0
    trials: list[Trial] = []
    groups = chunks(todo)
    with ThreadPoolExecutor(1) as background:
        # Each group is compiled while the one before it is measured.
        compiled = background.submit(_compile_chunk, groups[0], deadline)
        for index, group in enumerate(groups):
            dropped = compiled.result()
            if index + 1 < len(groups):
                compiled = background.submit(_compile_chunk, groups[index + 1], deadline)
            for tunable, key in group:
                gone = [t for t in dropped if (t.op, t.key) == (tunable.op, key)]
                late += time.monotonic() > deadline
                if time.monotonic() > deadline:
                    continue
                trials += _tune_key(tunable, key, gone, arguments.log)
                write_table(out, trials)  # after every key: what comes later may end the process
    _say(f"the table is {out}")
    if late:
        _say(f"no time was left for {late} of {len(todo)} keys: narrow it with --op or --key")
    return 0


def _tune_key(tunable: Tunable, key: str, gone: list[Trial], log: Path | None) -> list[Trial]:
    choices = [dict(choice) for choice in tunable.candidates(key)]
    is_gone = [trial.choice for trial in gone]
    found = gone + measure(tunable, key, [c for c in choices if c not in is_gone])
    _say_result(found, choices[0])
    if log:
        _log(log, found)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when something was measured, 2 where there is no GPU or nothing to tune."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        found = tunables(arguments.op)
    except ValueError as error:
        parser.error(str(error))
    todo = [(t, key) for t in found for key in t.keys if arguments.key in key]
    if arguments.compile:
        candidates = [(t, key, choice) for t, key in todo for choice in t.candidates(key)]
        dropped = compile_candidates(
            candidates, capability=arguments.compile, seconds=arguments.seconds
        )
        for trial in dropped:
            _say(f"{trial.op} {trial.key} {trial.choice}: {trial.dropped}")
        _say(f"{len(candidates)} candidates, {len(dropped)} do not compile")
        return 1 if dropped else 0
    if not torch.cuda.is_available():
        _say("no CUDA device: nothing can be measured (--compile 90 compiles without one)")
        return 2
    if not todo:
        _say("nothing to tune: no key fits")
        return 2
    for prepare in {tunable.prepare for tunable, _ in todo if tunable.prepare}:
        prepare()
    return _tune(todo, arguments)


if __name__ == "__main__":
    sys.exit(main())
