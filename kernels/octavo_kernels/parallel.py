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
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic as _numba_intrinsic

from octavo_kernels.machine_code import MachineCodeCache

MAX_ARGS = 48
# Pauses a worker spends looking for the next launch before it sleeps in the kernel: about 100 us,
# which covers the host code between two launches of one step but not the gap between steps.
_SPIN_PAUSES = 2000
# Pauses the caller spends waiting for the last part before it starts yielding its core.
_WAIT_PAUSES = 400

# State layout, byte offsets; hot words sit on cache lines of their own.
_TICKET, _DONE, _EPOCH, _SLEEPERS, _STOP, _TASK, _PARTS = 0, 128, 256, 384, 392, 512, 520
_ARGS = 640
_STATE_BYTES = _ARGS + 8 * MAX_ARGS

_FUTEX = (
    {"x86_64": 202, "aarch64": 98}.get(platform.machine(), -1) if sys.platform == "linux" else -1
)
_FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 128, 129


def intrinsic(typer: Callable[..., Any]) -> Any:
    """numba's intrinsic, typed for callers: kernels call it with values, without a context."""
    return _numba_intrinsic(typer)


_I64 = ir.IntType(64)


declare: Any = cgutils.get_or_insert_function


def _pointer(builder: Any, address: Any, type_: Any) -> Any:
    return builder.inttoptr(address, type_.as_pointer())


@intrinsic
def _atomic_load(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], _I64), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _atomic_store(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0], _I64), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _atomic_add(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0], _I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _atomic_swap_if(typingctx: Any, address: Any, expected: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pair = builder.cmpxchg(
            _pointer(builder, args[0], _I64), args[1], args[2], "seq_cst", "seq_cst"
        )
        return builder.extract_value(pair, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def _pause(typingctx: Any) -> Any:
    """Tells the core that this is a spin loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # Not inline assembly: numba sets up no assembly parser.
        machine, void = platform.machine().lower(), ir.VoidType()
        if machine in ("x86_64", "amd64"):
            kind = ir.FunctionType(void, [])
            name, values = "llvm.x86.sse2.pause", []
        elif machine in ("aarch64", "arm64"):
            kind = ir.FunctionType(void, [ir.IntType(32)])
            name, values = "llvm.aarch64.hint", [ir.IntType(32)(1)]
        else:
            return context.get_dummy_value()
        builder.call(declare(builder.module, kind, name), values)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _call_task(typingctx: Any, task: Any, part: Any, num_parts: Any, args_address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I64, _I64])
        builder.call(_pointer(builder, args[0], kind), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def _arg_int(typingctx: Any, args_address: Any, index: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = _pointer(builder, args[0], _I64)
        return builder.load(builder.gep(base, [args[1]]))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _arg_float(typingctx: Any, args_address: Any, index: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = _pointer(builder, args[0], ir.DoubleType())
        return builder.load(builder.gep(base, [args[1]]))

    return types.float64(types.int64, types.int64), codegen


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
        ticket = _atomic_load(state + _TICKET)
        left = ticket & 0xFFFFFFFF
        if left == 0:
            return taken
        if not _atomic_swap_if(state + _TICKET, ticket, ticket - 1):
            continue
        # The launch cannot end before this part is done, so task, parts and arguments are its own.
        num_parts = _arg_int(state + _PARTS, 0)
        _call_task(_arg_int(state + _TASK, 0), num_parts - left, num_parts, state + _ARGS)
        _atomic_add(state + _DONE, 1)
        taken += 1


def _worker(state: int) -> int:
    idle = 0
    while _atomic_load(state + _STOP) == 0:
        if _take_parts(state) > 0:
            idle = 0
            continue
        idle += 1
        if idle < _SPIN_PAUSES:
            _pause()
            continue
        _atomic_add(state + _SLEEPERS, 1)
        epoch = _atomic_load(state + _EPOCH)
        if (_atomic_load(state + _TICKET) & 0xFFFFFFFF) == 0 and _atomic_load(state + _STOP) == 0:
            if _FUTEX > 0:
                _syscall(_FUTEX, state + _EPOCH, _FUTEX_WAIT_PRIVATE, epoch & 0xFFFFFFFF, 0)
            else:
                _usleep(100)
        _atomic_add(state + _SLEEPERS, -1)
        idle = 0
    return 0


def _launch(state: int, task: int, num_parts: int) -> int:
    if num_parts == 1:
        _call_task(task, 0, 1, state + _ARGS)
        return 0
    epoch = _atomic_load(state + _EPOCH) + 1
    _atomic_store(state + _TASK, task)
    _atomic_store(state + _PARTS, num_parts)
    _atomic_store(state + _DONE, 0)
    _atomic_store(state + _EPOCH, epoch)
    _atomic_store(state + _TICKET, ((epoch & 0x7FFFFFFF) << 32) | num_parts)
    if _FUTEX > 0 and _atomic_load(state + _SLEEPERS) > 0:
        _syscall(_FUTEX, state + _EPOCH, _FUTEX_WAKE_PRIVATE, 0x7FFFFFFF, 0)
    _take_parts(state)
    waited = 0
    while _atomic_load(state + _DONE) != num_parts:
        waited += 1
        if waited < _WAIT_PAUSES:
            _pause()
        else:
            _sched_yield()
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
        self.args = (ctypes.c_char * (8 * MAX_ARGS)).from_address(self.state + _ARGS)
        self.launch = _dispatcher(_launch, types.int64(types.int64, types.int64, types.int64))
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
            self.launch(self.state, _nothing.address, 2)
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

    __slots__ = ("_address", "_body", "_names", "_pack", "name")

    def __init__(self, body: Callable[..., None]) -> None:
        code = body.__code__
        names = code.co_varnames[: code.co_argcount]
        assert names[:2] == ("part", "num_parts") and len(names) <= MAX_ARGS + 2
        self._names = names[2:]
        self._body = body
        codes = ("d" if _is_float(body, name) else "q" for name in self._names)
        self._pack = struct.Struct("=" + "".join(codes)).pack_into
        self._address = 0
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
        pool = _current or _start()
        with pool.lock:
            self._pack(pool.args, 0, *args)
            pool.launch(pool.state, address, num_parts)


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
        f"_arg_{'float' if _is_float(body, name) else 'int'}(args, {index})"
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
        "_arg_int": _arg_int,
        "_arg_float": _arg_float,
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
