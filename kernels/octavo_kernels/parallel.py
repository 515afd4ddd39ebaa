"""Runs compiled kernels over a small pool of threads; knows addresses and part counts, not tensors.

Why not OpenMP: the pool must never oversubscribe with torch's, must survive a host without
libgomp, must tolerate calls from several Python threads, and must not make a launch wait for a
worker that the system has put to sleep. A launch publishes one 64-bit ticket, (epoch, parts
left). Whoever swaps the ticket down owns that part; the caller works too and returns when every
part is done, so a late worker finds nothing and costs nothing.

Which thread computes a part never matters: a part's arithmetic depends on its number alone.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import platform
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

import numba
from numba.core import types
from numba.core.ccallback import CFunc

from octavo_kernels.machine_code import MachineCodeCache
from octavo_kernels.native import (
    arg_float,
    arg_int,
    atomic_add,
    atomic_load,
    atomic_store,
    atomic_swap_if,
    call_task,
    pause,
)
from octavo_kernels.native import declare as declare
from octavo_kernels.native import intrinsic as intrinsic

MAX_ARGS = 48
# Pauses a worker spends looking for the next launch before it sleeps in the kernel: about 100 us,
# which covers the host code between two launches of one step but not the gap between steps.
_SPIN_PAUSES = 2000
# Pauses the caller spends waiting for the last part before it starts yielding its core.
_WAIT_PAUSES = 400

# Words of an entry before its arguments: task, address of its number of parts, that number if it is
# fixed, bytes to the next entry.
ENTRY_HEAD = 4

# State layout, byte offsets; hot words sit on cache lines of their own.
_TICKET, _DONE, _EPOCH, _SLEEPERS, _STOP = 0, 128, 256, 384, 392
_TASK, _PARTS, _ARGS_AT = 512, 520, 528
_ENTRY = 640
_STATE_BYTES = _ENTRY + 8 * (ENTRY_HEAD + MAX_ARGS)

_FUTEX = (
    {"x86_64": 202, "aarch64": 98}.get(platform.machine(), -1) if sys.platform == "linux" else -1
)
_FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 128, 129


_syscall: Any = types.ExternalFunction("syscall", types.int64(*([types.int64] * 5)))
_sched_yield: Any = types.ExternalFunction("sched_yield", types.int32())
_usleep: Any = types.ExternalFunction("usleep", types.int32(types.uint32))


def _jit(function: Callable[..., Any]) -> Any:
    return numba.njit(nogil=True, error_model="numpy")(function)


@_jit
def _take_parts(state: int) -> int:
    """Computes parts until none is left; returns how many this thread did."""
    taken = 0
    while True:
        ticket = atomic_load(state + _TICKET)
        left = ticket & 0xFFFFFFFF
        if left == 0:
            return taken
        if not atomic_swap_if(state + _TICKET, ticket, ticket - 1):
            continue
        # The launch cannot end before this part is done, so task, parts and arguments are its own.
        num_parts = arg_int(state + _PARTS, 0)
        args = arg_int(state + _ARGS_AT, 0)
        call_task(arg_int(state + _TASK, 0), num_parts - left, num_parts, args)
        atomic_add(state + _DONE, 1)
        taken += 1


def _worker(state: int) -> int:
    idle = 0
    while atomic_load(state + _STOP) == 0:
        if _take_parts(state) > 0:
            idle = 0
            continue
        idle += 1
        if idle < _SPIN_PAUSES:
            pause()
            continue
        atomic_add(state + _SLEEPERS, 1)
        epoch = atomic_load(state + _EPOCH)
        if (atomic_load(state + _TICKET) & 0xFFFFFFFF) == 0 and atomic_load(state + _STOP) == 0:
            if _FUTEX > 0:
                _syscall(_FUTEX, state + _EPOCH, _FUTEX_WAIT_PRIVATE, epoch & 0xFFFFFFFF, 0)
            else:
                _usleep(100)
        atomic_add(state + _SLEEPERS, -1)
        idle = 0
    return 0


@_jit
def _launch(state: int, task: int, num_parts: int, args: int) -> None:
    if num_parts == 1:
        call_task(task, 0, 1, args)
        return
    epoch = atomic_load(state + _EPOCH) + 1
    atomic_store(state + _TASK, task)
    atomic_store(state + _PARTS, num_parts)
    atomic_store(state + _ARGS_AT, args)
    atomic_store(state + _DONE, 0)
    atomic_store(state + _EPOCH, epoch)
    atomic_store(state + _TICKET, ((epoch & 0x7FFFFFFF) << 32) | num_parts)
    if _FUTEX > 0 and atomic_load(state + _SLEEPERS) > 0:
        _syscall(_FUTEX, state + _EPOCH, _FUTEX_WAKE_PRIVATE, 0x7FFFFFFF, 0)
    _take_parts(state)
    waited = 0
    while atomic_load(state + _DONE) != num_parts:
        waited += 1
        if waited < _WAIT_PAUSES:
            pause()
        else:
            _sched_yield()


def _run(state: int, entry: int, end: int) -> int:
    """Launches the entries from one address up to another, one after the other."""
    while entry < end:
        num_parts = arg_int(arg_int(entry, 1), 0)
        if num_parts > 0:
            _launch(state, arg_int(entry, 0), num_parts, entry + 8 * ENTRY_HEAD)
        entry += arg_int(entry, 3)
    return 0


class _Pool:
    """One state block, its worker threads, and the lock that lets one launch in at a time."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self.lock = threading.Lock()
        # Never freed: a worker may look at it until the process is gone.
        raw = ctypes.CDLL(None).calloc
        raw.restype, raw.argtypes = ctypes.c_void_p, [ctypes.c_size_t, ctypes.c_size_t]
        block = raw(1, _STATE_BYTES + 128)
        if not block:
            raise MemoryError("the kernel pool could not allocate its state block")
        self.state: int = (block + 127) // 128 * 128
        # One entry, which every launch that is not a replay uses.
        self.entry: int = self.state + _ENTRY
        self.words = (ctypes.c_int64 * (ENTRY_HEAD + MAX_ARGS)).from_address(self.entry)
        self.words[1], self.words[3] = self.entry + 16, 8 * ENTRY_HEAD
        self.run = _dispatcher(_run, types.int64(types.int64, types.int64, types.int64))
        worker = _dispatcher(_worker, types.int64(types.int64))
        self._threads = [
            threading.Thread(
                target=worker, args=(self.state,), daemon=True, name=f"octavo-kernel-{i}"
            )
            for i in range(1, num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        with self.lock:
            word = ctypes.c_int64.from_address
            word(self.state + _STOP).value = 1
            # Two parts that do nothing: bumps the epoch and wakes the sleepers.
            self.words[0], self.words[2] = _nothing.address, 2
            self.run(self.state, self.entry, self.entry + 1)
            for thread in self._threads:
                thread.join()


def _dispatcher(function: Callable[..., Any], signature: Any) -> Any:
    dispatcher = _jit(function)
    dispatcher._cache = MachineCodeCache(function)
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    return dispatcher


def _is_float(body: Callable[..., None], name: str) -> bool:
    return body.__annotations__.get(name) in (float, "float")


class Kernel:
    """A compiled `body(part, num_parts, *args)`; calling it runs all parts and returns.

    Arguments are integers (sizes, addresses: `tensor.data_ptr()`) unless annotated `float`.
    The first call compiles, or loads the machine code from the cache; later ones cost about 1 us.
    The callee must keep the tensors behind the addresses alive and contiguous.
    """

    __slots__ = ("_address", "_body", "_held", "_names", "_pack", "name")

    def __init__(self, body: Callable[..., None]) -> None:
        code = body.__code__
        names = code.co_varnames[: code.co_argcount]
        assert names[:2] == ("part", "num_parts") and len(names) <= MAX_ARGS + 2
        self._names = names[2:]
        self._body = body
        codes = ("d" if _is_float(body, name) else "q" for name in self._names)
        self._pack = struct.Struct("=" + "".join(codes))
        self._address = 0
        self._held: Any = None  # `run_held`'s way in, made at its first call
        self.name = f"{body.__module__}.{body.__name__}"

    @property
    def address(self) -> int:
        """The machine code's entry, compiled or loaded now if it was not yet."""
        if not self._address:
            self._address = _compile(self._body, self._names)
        return self._address

    @property
    def is_cached(self) -> bool:
        """Whether `address` would only load the machine code, if that; asked without loading."""
        if self._address:
            return True
        entry = _entry(self._body, self._names)
        return MachineCodeCache(entry, body=self._body).holds(_ENTRY_SIGNATURE)

    def __call__(self, num_parts: int, *args: int | float) -> None:
        """Runs parts 0..num_parts-1, on several threads where num_parts > 1."""
        if num_parts <= 0:
            return
        address = self._address or self.address
        if _recorder is not None and _recorder(address, 0, num_parts, self._pack.pack(*args)):
            return
        pool = _current or _start()
        with pool.lock:
            words = pool.words
            words[0], words[2] = address, num_parts
            self._pack.pack_into(words, 8 * ENTRY_HEAD, *args)
            pool.run(pool.state, pool.entry, pool.entry + 1)

    def launch_at(self, parts_address: int, *args: int | float) -> None:
        """Runs as many parts as the int64 at an address says at the time of the launch (0: none).

        For a number that another kernel decides: a replay of this launch reads it again.
        """
        recorder = _recorder
        if recorder and recorder(self.address, parts_address, 0, self._pack.pack(*args)):
            return
        self(ctypes.c_int64.from_address(parts_address).value, *args)

    def run_held(self, *args: int | float) -> None:
        """Runs the only part of a launch that takes microseconds, and is never recorded.

        Keeps the interpreter lock: whoever waits for it would else take it now and keep it while
        it computes in Python, with all kernel threads idle meanwhile.
        """
        if self._held is None:
            entry = ctypes.PYFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_char_p)
            self._held = entry(self.address)
        self._held(0, 1, self._pack.pack(*args))


# Told of every launch of this process while some code is being recorded: task, address of the
# number of parts or 0, that number, packed arguments. True: it is not to be run now.
Recorder = Callable[[int, int, int, bytes], bool]
_recorder: Recorder | None = None


def set_recorder(recorder: Recorder | None) -> None:
    """Begins (or, with None, ends) telling of launches."""
    global _recorder
    _recorder = recorder


def run_entries(start: int, end: int) -> None:
    """Launches recorded entries [start, end) in one native call (for `recording`)."""
    pool = _current or _start()
    with pool.lock:
        pool.run(pool.state, start, end)


def kernel(body: Callable[..., None]) -> Kernel:
    """Decorator: makes `body(part, num_parts, *args)` a Kernel. Compiles nothing yet."""
    return Kernel(body)


def device(function: Callable[..., Any]) -> Any:
    """Decorator: a function that kernels call; IEEE order kept, no GIL, division by zero is inf."""
    return _jit(function)


_COMPILE_LOCK = threading.Lock()


_ENTRY_SIGNATURE = types.void(types.int64, types.int64, types.int64)


def _entry(body: Callable[..., None], names: tuple[str, ...]) -> Any:
    """A function `(part, num_parts, args)` that unpacks its arguments and calls body."""
    loads = [
        f"arg_{'float' if _is_float(body, name) else 'int'}(args, {index})"
        for index, name in enumerate(names)
    ]
    entry_name = f"{body.__module__.replace('.', '_')}__{body.__name__}"
    # Bodies made by one factory share a qualified name, which ends up in their symbols.
    body.__qualname__ = entry_name
    values = ", ".join(["part", "num_parts", *loads])
    source = f"def {entry_name}(part, num_parts, args):\n    body({values})\n"
    scope: dict[str, Any] = {
        "__name__": body.__module__,
        "body": _jit(body),
        "arg_int": arg_int,
        "arg_float": arg_float,
    }
    exec(compile(source, body.__code__.co_filename, "exec"), scope)
    return scope[entry_name]


def _compile(body: Callable[..., None], names: tuple[str, ...]) -> int:
    """Compiles body behind a C entry, or loads it from the cache."""
    entry = _entry(body, names)
    with _COMPILE_LOCK:
        signature = (_ENTRY_SIGNATURE.args, _ENTRY_SIGNATURE.return_type)
        options = {"error_model": "numpy", "nopython": True, "nogil": True}
        compiled: Any = CFunc(entry, signature, {}, options)
        compiled._cache = MachineCodeCache(entry, body=body)
        compiled.compile()
    _KEEP.append(compiled)
    return int(compiled.address)


_KEEP: list[Any] = []  # machine code lives as long as its CFunc
_current: _Pool | None = None
_wanted_threads = 0
_start_lock = threading.Lock()


@kernel
def _nothing(part: int, num_parts: int) -> None:
    pass


def _start() -> _Pool:
    global _current
    with _start_lock:
        if _current is None:
            assert _nothing.address
            _current = _Pool(num_threads())
        return _current


def warm() -> None:
    """Starts the threads, which the first launch does otherwise; compiles or loads their code."""
    _start()


def num_threads() -> int:
    """Threads that share a launch, the caller's included."""
    if _wanted_threads:
        return _wanted_threads
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_num_threads(count: int) -> None:
    """Sets how many threads share a launch. Results do not depend on it.

    Raises ValueError below 1. Not to be called while another thread is inside a kernel.
    """
    global _current, _wanted_threads
    if count < 1:
        raise ValueError(f"the number of kernel threads must be at least 1, got {count}")
    with _start_lock:
        pool, _current, _wanted_threads = _current, None, count
    if pool is not None:
        pool.stop()


@atexit.register
def _stop_at_exit() -> None:
    if _current is not None:
        _current.stop()


def _forget_after_fork() -> None:
    # The child has none of the workers; it starts its own pool at its first launch.
    global _current, _start_lock
    _current, _start_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
