"""Octavo's folder in the user's cache: where it is, and how files enter it whole or not at all.

Knows paths and locks; knows nothing of what is cached.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cache_dir() -> Path:
    """``OCTAVO_CACHE``, else ``octavo`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    named = os.environ.get("OCTAVO_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo"


def writable_cache_dir() -> Path:
    """`cache_dir`, or a private folder among the temporary files when that cannot be written."""
    folder = cache_dir()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    folder = Path(tempfile.gettempdir()) / f"octavo-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ValueError(
            f"neither {cache_dir()} nor {folder} can be written; "
            "set OCTAVO_CACHE to a folder that can"
        )
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds ``path``.lock against other processes; the system drops it if the holder dies."""
    with open(path.with_name(path.name + ".lock"), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def cached_folder(name: str, *, build: Callable[[Path], None]) -> Path:
    """Folder ``name`` of the cache, built by ``build(empty folder)`` if it is not there.

    Readers see a finished folder or none: it is built beside its place and renamed.
    """
    if (ready := cache_dir() / name).is_dir():
        return ready
    target = writable_cache_dir() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        if target.is_dir():
            return target
        for leftover in target.parent.glob(f".{target.name}-*"):
            # We hold the lock, so whoever made it is dead.
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            build(work)
            work.chmod(0o755)  # mkdtemp makes it private; an image is built and run by two users
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target
