"""Keeps compiled kernels on disk between processes; knows files and source hashes, no kernel.

numba's own cache looks at one source file's time stamp, so it serves stale code after a change in
a file that the kernel calls into, and it raises where no directory can be written. This one
hashes every octavo_kernels source file a kernel can reach, reads from any candidate directory,
writes to the first that accepts, and compiles anew when all fail.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import pickle
import secrets
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import (
    CompileResultCacheImpl,
    FunctionCache,
    IndexDataCacheFile,
    NullCache,
)
from numba.core.registry import cpu_target

_PACKAGE = __name__.partition(".")[0]
_numba_config: Any = numba.config
_cpu_target: Any = cpu_target
# numba numbers functions per process and puts the number into symbol names, which it then merges
# by name. Two closures compiled by two processes may bear one name, and a third process loading
# both from disk would run one in place of the other. Numbers from a random start never meet.
_identity: Any = FunctionIdentity
_identity._unique_ids = itertools.count(secrets.randbits(48))
_log = logging.getLogger(__name__)


@cache
def _file_digest(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


def _source_stamp(function: Callable[..., Any]) -> str:
    """Hash of the function's file and of every file of this package that it imports from."""
    seen: dict[str, ModuleType] = {}
    waiting = [sys.modules[function.__module__]]
    while waiting:
        module = waiting.pop()
        if module.__name__ in seen:
            continue
        seen[module.__name__] = module
        for value in vars(module).values():
            owner = (
                value.__name__
                if isinstance(value, ModuleType)
                else getattr(value, "__module__", None)
            )
            if (
                isinstance(owner, str)
                and owner.partition(".")[0] == _PACKAGE
                and owner in sys.modules
            ):
                waiting.append(sys.modules[owner])
    total = hashlib.sha256()
    for name in sorted(seen):
        path = seen[name].__file__
        if path is not None:
            total.update(name.encode() + _file_digest(path))
    return total.hexdigest()


class _Locator:
    """Where one function's machine code lies; duck-typed to what numba's CacheImpl asks."""

    def __init__(self, directory: Path, stamp: str) -> None:
        self._directory = directory
        self._stamp = stamp

    def ensure_cache_path(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)

    def get_cache_path(self) -> str:
        return str(self._directory)

    def get_source_stamp(self) -> str:
        return self._stamp

    def get_disambiguator(self) -> str:
        return "0"


class _SealedFiles(IndexDataCacheFile):
    """Index and data of one function. Data bear a digest: of damaged code LLVM may end the process
    instead of raising. An index that cannot be read is as good as none."""

    def _load_index(self) -> Any:
        try:
            return super()._load_index()  # type: ignore[no-untyped-call]
        except OSError:
            raise
        except Exception as error:
            _log.debug("unreadable index of machine code: %r", error)
            return {}

    def _save_data(self, name: str, data: Any) -> None:
        dumped = self._dump(data)  # type: ignore[no-untyped-call]
        path = self._data_path(name)  # type: ignore[no-untyped-call]
        with self._open_for_write(path) as file:
            file.write(hashlib.sha256(dumped).digest() + dumped)

    def _load_data(self, name: str) -> Any:
        path = self._data_path(name)  # type: ignore[no-untyped-call]
        sealed = Path(path).read_bytes()
        if hashlib.sha256(sealed[32:]).digest() != sealed[:32]:
            raise ValueError(f"{path} is damaged")
        return pickle.loads(sealed[32:])


def _directories() -> list[Path]:
    folders = []
    if _numba_config.CACHE_DIR:
        folders.append(Path(_numba_config.CACHE_DIR) / _PACKAGE)
    folders.append(Path(__file__).parent / "__pycache__")
    with contextlib.suppress(RuntimeError):  # no home directory
        folders.append(Path.home() / ".cache" / "octavo" / "kernels")
    return folders


def is_any_writable() -> bool:
    """Whether machine code can be kept in some directory."""
    for directory in _directories():
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                return True
    return False


class MachineCodeCache(NullCache):
    """One function's entry: load from any directory, save to the first writable, never raise.

    Signatures are kept as text: a C callback's Signature does not hash alike once unpickled, so
    numba's own index never finds it again.
    """

    def __init__(
        self, function: Callable[..., Any], *, body: Callable[..., Any] | None = None
    ) -> None:
        stamp = _source_stamp(body or function)
        self._caches: list[Any] = [
            _directory_cache(function, path, stamp) for path in _directories()
        ]

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        for place in self._caches:
            try:
                found = place.load_overload(str(sig), target_context)
            except Exception as error:
                # Torn file, other numba version, foreign pickle: any of them means compile anew.
                _log.debug("unreadable machine code in %s: %r", place.cache_path, error)
                continue
            if found is not None:
                return found
        return None

    def holds(self, sig: Any) -> bool:
        """Whether some directory has code for the signature and this machine; loads none."""
        codegen = _cpu_target.target_context.codegen()
        for place in self._caches:
            try:
                file = place._cache_file
                name = file._load_index().get(place._index_key(str(sig), codegen))
                if name is not None and os.path.exists(file._data_path(name)):
                    return True
            except Exception as error:
                _log.debug("unreadable machine code in %s: %r", place.cache_path, error)
        return False

    def save_overload(self, sig: Any, data: Any) -> None:
        for place in self._caches:
            try:
                place.save_overload(str(sig), data)
            except OSError as error:
                _log.debug("cannot keep machine code in %s: %s", place.cache_path, error)
            else:
                return


def _directory_cache(function: Callable[..., Any], directory: Path, stamp: str) -> Any:
    class Located(CompileResultCacheImpl):
        def __init__(self, py_func: Callable[..., Any]) -> None:
            self._lineno = py_func.__code__.co_firstlineno
            self._locator = _Locator(directory, stamp)
            base: Any = self.get_filename_base
            self._filename_base = base(py_func.__name__, sys.implementation.cache_tag)

        def check_cachable(self, cres: Any) -> bool:
            # numba's own warns, and looks for a source file that a locator need not have.
            if any(not lifted.can_cache for lifted in cres.lifted):
                return False
            return not cres.library.has_dynamic_globals

    class LocatedCache(FunctionCache):
        _impl_class = Located

    make: Any = LocatedCache
    found = make(function)
    sealed: Any = _SealedFiles
    found._cache_file = sealed(
        cache_path=found.cache_path,
        filename_base=found._impl.filename_base,
        source_stamp=stamp,
    )
    return found
