"""The house's import direction, held by reading every import statement."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVER = ROOT / "server" / "octavo"
KERNELS = ROOT / "kernels" / "octavo_kernels"

# A room may import itself and the rooms named here. Top-level modules count as rooms.
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "clock": set(),
    "config": set(),
    "kvcache": {"types", "config"},
    "scheduler": {"types", "config", "kvcache"},
    "engine": {"types", "config", "clock", "kvcache", "scheduler", "text"},
    "checkpoint": {"types", "config"},
    "text": {"types", "config", "checkpoint"},
    "observability": {"types", "config"},
    "api": {"types", "config", "engine", "text", "observability", "checkpoint"},
    "attention": {"types", "config"},
    "sampling": {"types", "config"},
    "platforms": {"types", "config", "checkpoint", "attention"},
    "layers": {"types", "config", "attention", "platforms"},
    "speculative": {"types", "config"},
    "models": {"types", "config", "checkpoint", "attention", "platforms", "layers"},
    "worker": {
        "types",
        "config",
        "checkpoint",
        "attention",
        "platforms",
        "layers",
        "models",
        "sampling",
        "speculative",
    },
    "distill": {
        "types",
        "config",
        "flags",
        "checkpoint",
        "attention",
        "platforms",
        "models",
        "worker",
        "llm",
    },
}
# These assemble the house and may import any room.
ASSEMBLERS = {"__main__", "cli", "llm", "bench", "flags", "compat", "__init__"}
# These join both wings: the engine process, and what it shares with the offline engine.
JOINTS = {"engine/process.py", "engine/build.py"}

# Control plane: deciding what to compute never needs tensors.
NO_TORCH = (
    "types",
    "clock",
    "config",
    "kvcache",
    "scheduler",
    "text",
    "observability",
    "api",
    "speculative",
)
TORCH_LIKE = {"torch", "numba", "octavo_kernels"}
PURE = ("kvcache", "scheduler")
IMPURE = {"time", "logging", "random", "asyncio", "threading", "numpy", "os"}


def modules(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def room_of(path: Path) -> str:
    relative = path.relative_to(SERVER)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def runtime_imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute module names imported anywhere in the file, except under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                skipped.update(ast.walk(child))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.module, node.lineno
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


@pytest.mark.parametrize("path", modules(SERVER), ids=lambda p: str(p.relative_to(SERVER)))
def test_rooms_import_downwards(path: Path) -> None:
    room = room_of(path)
    if room in ASSEMBLERS or str(path.relative_to(SERVER)) in JOINTS:
        return
    assert room in ALLOWED, f"a new room {room!r}: give it a place in ALLOWED"
    for name, line in runtime_imports(path):
        parts = name.split(".")
        if parts[0] != "octavo" or len(parts) < 2 or parts[1] in (room, "__version__"):
            continue
        assert parts[1] in ALLOWED[room], f"{path}:{line}: {room} imports {name}"


@pytest.mark.parametrize("room", NO_TORCH)
def test_control_plane_has_no_torch(room: str) -> None:
    for path in modules(SERVER):
        if room_of(path) == room:
            for name, line in runtime_imports(path):
                assert name.split(".")[0] not in TORCH_LIKE, f"{path}:{line}: imports {name}"


@pytest.mark.parametrize("room", PURE)
def test_scheduler_and_cache_are_pure(room: str) -> None:
    for path in modules(SERVER):
        if room_of(path) == room:
            for name, line in runtime_imports(path):
                assert name.split(".")[0] not in IMPURE, f"{path}:{line}: imports {name}"


def test_kernels_stand_alone() -> None:
    for path in modules(KERNELS):
        for name, line in runtime_imports(path):
            assert name.split(".")[0] != "octavo", f"{path}:{line}: imports {name}"


def test_types_and_config_know_only_the_standard_library() -> None:
    import sys

    for file in ("types.py", "config.py", "clock.py"):
        for name, line in runtime_imports(SERVER / file):
            assert name.split(".")[0] in sys.stdlib_module_names, f"{file}:{line}: {name}"


def test_no_package_shadows_another() -> None:
    """A top-level ``kernels`` package breaks transformers; ``tests`` packages shadow ours."""
    for folder in ("server", "kernels"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_only_ipc_opens_sockets_and_nobody_pickles() -> None:
    for path in modules(SERVER):
        for name, line in runtime_imports(path):
            assert name.split(".")[0] not in {"pickle", "dill", "cloudpickle"}, f"{path}:{line}"
            if name.split(".")[0] == "zmq":
                assert path.relative_to(SERVER).as_posix() == "engine/ipc.py", f"{path}:{line}"
