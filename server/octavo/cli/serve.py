"""``octavo serve``: the engine process, the HTTP server over it, and their common end.

Knows processes, sockets and signals; requests are `octavo.api`'s, steps the engine's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import ssl
import stat
import sys
import time
from collections.abc import Sequence
from typing import Any

from octavo import __version__
from octavo.cli.api_child import ApiChild
from octavo.cli.options import add_engine_flags, engine_config, server_config
from octavo.config import EngineConfig, ServerConfig
from octavo.engine.launch import EngineProcess
from octavo.types import EngineInfo

HELP = "serve a model over an OpenAI-compatible HTTP API"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "positional_model",
        metavar="MODEL",
        nargs="?",
        help="Hugging Face id, local folder, or .gguf file; default SmolLM2-135M-Instruct",
    )
    add_engine_flags(parser, also=(ServerConfig,))


def run(args: argparse.Namespace) -> int:
    config, server = engine_config(args), server_config(args)
    _check_tls(server)
    count = server.api_server_count or _usual_count(config)
    try:
        listeners = _bind(server, count)
    except OSError as error:
        where = server.uds or f"{server.host}:{server.port}"
        print(
            f"octavo serve: error: cannot listen on {where}: {error.strerror or error}",
            file=sys.stderr,
        )
        return 1
    process = EngineProcess(
        config,
        num_front_ends=count,
        fake_executor=args.fake_executor,
        fake_device=args.fake_device,
        log_level=server.uvicorn_log_level,
    )
    children: list[ApiChild] = []
    try:
        for number in range(1, count):
            children.append(ApiChild(number, listeners[number]))
        return _serve(args, config, server, listeners[0], process, children)
    finally:
        for child in children:
            child.close()
        process.close(timeout=0)
        for listener in listeners:
            listener.close()
        if server.uds is not None:
            with contextlib.suppress(OSError):
                os.unlink(server.uds)


def _check_tls(server: ServerConfig) -> None:
    """Raises ValueError when the TLS files do not fit or cannot be read."""
    if server.ssl_certfile is None:
        if server.ssl_keyfile is not None or server.ssl_ca_certs is not None:
            raise ValueError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile")
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(server.ssl_certfile, server.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        files = " and ".join(f for f in (server.ssl_certfile, server.ssl_keyfile) if f)
        raise ValueError(f"cannot use the TLS certificate and key {files}: {error}") from None
    if server.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(server.ssl_ca_certs)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"cannot use --ssl-ca-certs {server.ssl_ca_certs}: {error}") from None


def _usual_count(config: EngineConfig) -> int:
    """HTTP processes, when none were asked for. One keeps up with what a CPU generates; a GPU may
    be faster, and the engine and its driver want cores too."""
    device = config.model.device
    has_gpu = device == "cuda" or (device == "auto" and os.path.exists("/dev/nvidiactl"))
    return min(4, max(1, len(os.sched_getaffinity(0)) // 8)) if has_gpu else 1


def _bind(server: ServerConfig, count: int) -> list[socket.socket]:
    """Bound sockets that refuse connections until they are listened on, one for each HTTP process;
    the system spreads connections among them. Raises OSError."""
    if server.uds is not None:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(server.uds).st_mode) and not _answers(server.uds):
                os.unlink(server.uds)  # left by a server that was killed
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(server.uds)
        os.chmod(server.uds, 0o666)
        return [listener] * count  # such a socket has one queue, and takers take turns
    family, kind, protocol, _, address = socket.getaddrinfo(
        server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]

    def bind(address: Any, *options: int) -> socket.socket:
        listener = socket.socket(family, kind, protocol)
        try:
            for option in (socket.SO_REUSEADDR, *options):
                listener.setsockopt(socket.SOL_SOCKET, option, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
        return listener

    # Alone first: with SO_REUSEPORT two servers could have one port without knowing.
    listener = bind(address)
    if count == 1:
        return [listener]
    address = listener.getsockname()
    listener.close()
    return [bind(address, socket.SO_REUSEPORT) for _ in range(count)]


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == 0


def _serve(
    args: argparse.Namespace,
    config: EngineConfig,
    server: ServerConfig,
    listener: socket.socket,
    process: EngineProcess,
    children: Sequence[ApiChild],
) -> int:
    # Lazy: a third of a second and more, while the engine process already imports and loads.
    from octavo.cli.http_server import serve_http
    from octavo.engine.async_engine import EngineStartError

    def ready(info: EngineInfo) -> None:
        seconds = time.monotonic() - args.started
        print(_decisions(config, info), flush=True)
        print(f"ready in {seconds:.1f} s: {_url(server, listener)}", flush=True)

    try:
        return serve_http(
            config,
            server,
            listener=listener,
            process=process,
            children=children,
            on_ready=ready,
        )
    except EngineStartError as error:
        print(f"octavo serve: error: {error}", file=sys.stderr)
        return 2 if error.is_user_error else 1


def _decisions(config: EngineConfig, info: EngineInfo) -> str:
    """What was decided at start, and how long each part of it took."""
    threads = f", {info.num_threads} threads" if info.num_threads else ""
    tokens = info.num_blocks * info.block_size
    caching = "on" if config.cache.enable_prefix_caching else "off"
    overlap = "on" if config.scheduler.async_scheduling else "off"
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in info.phases.items())
    lines = [
        f"Octavo {__version__}",
        f"  model    {info.model} ({info.architecture}), {info.dtype} on {info.device}{threads}",
        f"  weights  {_weights(config, info)}",
        f"  cache    {info.num_blocks:,} blocks of {info.block_size} tokens: {tokens:,} tokens of "
        f"K/V in {info.kv_cache_dtype}, prefix caching {caching}",
        f"  context  {info.max_model_len:,} tokens",
        f"  batch    at most {info.max_num_seqs:,} requests and {info.max_num_batched_tokens:,} "
        f"tokens in a step, {config.scheduler.scheduling_policy}, overlap {overlap}",
        f"  drafts   {_drafts(info)}",
        f"  start    {phases or 'nothing to load'}",
    ]
    return "\n".join(lines)


def _drafts(info: EngineInfo) -> str:
    """Who drafts, and how far."""
    if not info.max_drafts:
        return "off"
    return f"{info.speculation}, at most {info.max_drafts} tokens of a request in a step"


def _weights(config: EngineConfig, info: EngineInfo) -> str:
    """What they are, why, and how to get the exact ones."""
    mode, wanted = info.quantization.partition(" ")[0], config.model.quantization
    if mode == "none":
        return f"not quantised, as asked for: {info.dtype}" if wanted == "none" else info.dtype
    reason = "the fastest that holds its quality" if wanted == "auto" else "as asked for"
    return f"{info.quantization}, {reason}; exact with --quantization none"


def _url(server: ServerConfig, listener: socket.socket) -> str:
    scheme = "http" if server.ssl_certfile is None else "https"
    if server.uds is not None:
        return f"{scheme}+unix://{server.uds}"
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}{server.root_path}"
