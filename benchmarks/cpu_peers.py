"""The servers of the CPU table: how each is started, what version it is, whether it is there.

Peers come from a folder with ``peers.sh``, which starts one of them by name on a port with the
model under the name "m", and keeps them in a folder of its own (PEERS). Measures nothing.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# No prompt of the table is longer than 576 + 32 tokens and no level wider than 32.
_OCTAVO = "-m octavo serve --served-model-name m --max-model-len 2048 --max-num-seqs 32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A server to start. ``title`` is its column's head."""

    name: str
    title: str
    command: str
    port: int
    version: str
    extra_env: Mapping[str, str] = field(default_factory=dict)


def octavo(*, port: int, flags: str = "", version: str) -> Contender:
    """This checkout's server, by the interpreter that runs the benchmark."""
    command = f"{shlex.quote(sys.executable)} {_OCTAVO} --port {port} {flags}".rstrip()
    title = f"Octavo {flags}".rstrip()
    return Contender(name="octavo", title=title, command=command, port=port, version=version)


def llama_version(home: Path) -> str | None:
    """Of the llama-server in the peers' folder; None where there is none that runs."""
    program = home / "build/bin/llama-server"
    try:
        said = subprocess.run(
            [program, "--version"], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_llama_version(said.stdout + said.stderr)


def parse_llama_version(text: str) -> str:
    """The number of the build among other lines: ``version: 0.6.0 (build 11434, commit 4227c9b)``,
    formerly ``version: 11434 (4227c9b)``; "unknown" without it."""
    line = re.search(r"^version:.*$", text, re.MULTILINE)
    found = line and (
        re.search(r"build (\d+)", line[0]) or re.search(r"^version:\s*(\d+)", line[0])
    )
    return found[1] if found else "unknown"


def vllm_version(home: Path) -> str | None:
    """Of the vLLM in the peers' folder; None where there is none."""
    folders = sorted(home.glob("venv-vllm/lib/python3*/site-packages/vllm*.dist-info"))
    return folders[0].name.removesuffix(".dist-info").partition("-")[2] if folders else None


def peers(scripts: Path, home: Path, *, ports: Mapping[str, int]) -> list[Contender | str]:
    """The peers by the names in ``ports``; for one that is not set up, what to say instead."""
    known = {
        "llama": ("llama-server Q4_1", llama_version),
        "vllm": ("vLLM (CPU) fp32", vllm_version),
    }
    found: list[Contender | str] = []
    script = (scripts / "peers.sh").resolve()
    for name, port in ports.items():
        title, version_of = known[name]
        version = version_of(home)
        if not script.is_file() or version is None:
            found.append(f"{title}: left out, not set up in {home} ({script} setup {name})")
            continue
        found.append(
            Contender(
                name=name,
                title=title,
                command=f"bash {shlex.quote(str(script))} start {name} {port}",
                port=port,
                version=version,
                extra_env={"PEERS": str(home)},
            )
        )
    return found
