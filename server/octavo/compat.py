"""vLLM's flags that Octavo has not got: which are harmless, which are refused, and why.

A flag that only tunes how vLLM reaches a result is accepted with a warning; one that would change
what users get is an error, because ignoring it would be a lie. Knows nothing of our own flags.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignFlag:
    """One flag of vLLM. ``harmless`` values of a refused flag ask for what we do anyway."""

    name: str
    reason: str
    nargs: int | str = 1
    is_refused: bool = False
    harmless: tuple[str, ...] = ()
    short: tuple[str, ...] = ()


def _ignored(names: str, reason: str, *, nargs: int | str = 1) -> list[ForeignFlag]:
    return [ForeignFlag(name=name, reason=reason, nargs=nargs) for name in names.split()]


def _refused(
    names: str,
    reason: str,
    *,
    nargs: int | str = 1,
    harmless: tuple[str, ...] = (),
    short: tuple[str, ...] = (),
) -> list[ForeignFlag]:
    return [
        ForeignFlag(
            name=name,
            reason=reason,
            nargs=nargs,
            is_refused=True,
            harmless=harmless,
            short=short,
        )
        for name in names.split()
    ]


_COMPILED = "kernels are compiled before the server is ready, and not tuned otherwise"
_LOGS = "logging has fewer switches here"
_GPU = "the engine runs on one device"

FOREIGN_FLAGS: tuple[ForeignFlag, ...] = (
    # ---- accepted, with a warning: no result depends on them
    *_ignored("--compilation-config --optimization-level --performance-mode", _COMPILED),
    *_ignored("--enable-chunked-prefill --no-enable-chunked-prefill", "always on", nargs=0),
    *_ignored("--swap-space", "preempted requests are recomputed"),
    *_ignored("--cpu-offload-gb", "the model is held where it runs"),
    *_ignored("--disable-log-requests", "off by default", nargs=0),
    *_ignored("--tokenizer-mode", "tokenizer.json is always used"),
    *_ignored("--model-impl", "each architecture has one implementation"),
    *_ignored("--attention-backend", "the device decides"),
    *_ignored("--prefix-caching-hash-algo", "always SHA-256"),
    *_ignored("--max-seq-len-to-capture", "graphs are captured for contexts of any length"),
    *_ignored("--disable-custom-all-reduce --enable-expert-parallel", _GPU, nargs=0),
    *_ignored("--distributed-executor-backend", _GPU),
    *_ignored("--disable-frontend-multiprocessing", "the engine has a process", nargs=0),
    *_ignored("--stream-interval", "each token is sent when it is there"),
    *_ignored("--watermark", "admission needs no head-room"),
    *_ignored("--h11-max-incomplete-event-size --h11-max-header-count", "httptools is used"),
    *_ignored("--max-log-len --log-config-file", _LOGS),
    *_ignored("--enable-log-outputs --enable-log-deltas --log-error-stack", _LOGS, nargs=0),
    *_ignored("--disable-access-log-for-endpoints", _LOGS),
    *_ignored("--kv-cache-metrics --enable-mfu-metrics", "not measured here", nargs=0),
    *_ignored("--enable-prompt-tokens-details", "always reported", nargs=0),
    *_ignored("--enable-server-load-tracking", "always tracked", nargs=0),
    *_ignored("--jit-monitor-mode", _COMPILED),
    *_ignored("--use-v2-block-manager --enable-ssl-refresh", "not needed here", nargs=0),
    *_ignored("--limit-mm-per-prompt", "models here read text only"),
    # ---- refused unless they ask for what happens anyway
    *_refused("--tensor-parallel-size", _GPU, harmless=("1",), short=("-tp",)),
    *_refused("--pipeline-parallel-size", _GPU, harmless=("1",), short=("-pp",)),
    *_refused("--data-parallel-size", _GPU, harmless=("1",), short=("-dp",)),
    *_refused(
        "--decode-context-parallel-size --prefill-context-parallel-size", _GPU, harmless=("1",)
    ),
    *_refused("--spec-method --spec-model --spec-tokens", "say it in --speculative-config"),
    *_refused("--enable-lora", "there are no LoRA adapters", nargs=0),
    *_refused("--lora-modules", "there are no LoRA adapters", nargs="*"),
    *_refused("--max-loras --max-lora-rank --max-cpu-loras", "there are no LoRA adapters"),
    *_refused("--trust-remote-code", "code of model repositories is never run", nargs=0),
    *_refused("--hf-overrides", "the model's config.json is used as it is", harmless=("{}",)),
    *_refused("--hf-token", "set the HF_TOKEN environment variable: flags are visible to others"),
    *_refused(
        "--override-generation-config", "edit generation_config.json, or --generation-config vllm"
    ),
    *_refused("--logprobs-mode", "logprobs are of the raw logits", harmless=("raw_logprobs",)),
    *_refused("--runner", "only text generation is served", harmless=("auto", "generate")),
    *_refused("--task", "only text generation is served", harmless=("auto", "generate")),
    *_refused("--convert", "only text generation is served", harmless=("auto", "none")),
    *_refused("--pooler-config", "only text generation is served"),
    *_refused("--reasoning-parser", "reasoning is not split from the answer"),
    *_refused("--enable-auto-tool-choice", "tools are not parsed", nargs=0),
    *_refused("--tool-call-parser --tool-parser-plugin --tool-server", "tools are not parsed"),
    *_refused("--structured-outputs-config", "output is not constrained by a grammar"),
    *_refused("--kv-offloading-backend", "the server offloads by itself", harmless=("native",)),
    *_refused("--kv-transfer-config --kv-events-config", "the K/V cache is not shared"),
    *_refused("--max-num-queued-tokens", "use --max-num-queued-reqs"),
    *_refused("--enable-sleep-mode", "the engine does not sleep", nargs=0),
    *_refused("--otlp-traces-endpoint --profiler-config", "there is no tracing"),
    *_refused("--middleware", "no code is loaded into the server"),
    *_refused("--ssl-cert-reqs --ssl-ciphers", "TLS takes the system's defaults"),
    *_refused("--chat-template-content-format", "found from the template", harmless=("auto",)),
    *_refused("--default-chat-template-kwargs", "send chat_template_kwargs with the request"),
    *_refused("--trust-request-chat-template", "templates come with the model", nargs=0),
    *_refused("--return-tokens-as-token-ids", "ask for it in the request", nargs=0),
    *_refused("--enable-force-include-usage", "ask for stream_options.include_usage", nargs=0),
    *_refused("--enable-tokenizer-info-endpoint", "there is no such endpoint", nargs=0),
    *_refused("--headless --tokens-only --grpc", "there is one kind of server", nargs=0),
    *_refused("--config", "give the options as flags"),
)


class _IgnoredAction(argparse.Action):
    def __init__(self, *, reason: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reason = reason

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        warnings = getattr(namespace, "compat_warnings", [])
        namespace.compat_warnings = [
            *warnings,
            f"{option_string} has no effect: {self.reason}",
        ]


class _RefusedAction(argparse.Action):
    def __init__(self, *, reason: str, harmless: tuple[str, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reason = reason
        self.harmless = harmless

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        got = list(values) if isinstance(values, list) else []
        if got and all(value in self.harmless for value in got):
            return
        allowed = f" (only {' or '.join(self.harmless)})" if self.harmless else ""
        parser.error(f"{option_string} is not supported{allowed}: {self.reason}")


def add_foreign_flags(parser: argparse.ArgumentParser) -> None:
    """Makes `parser` know vLLM's flags: warnings gather in ``namespace.compat_warnings``, a
    refused flag ends the program with its reason."""
    for flag in FOREIGN_FLAGS:
        action: dict[str, Any] = {"action": _IgnoredAction, "reason": flag.reason}
        if flag.is_refused:
            action = {"action": _RefusedAction, "reason": flag.reason, "harmless": flag.harmless}
        parser.add_argument(
            flag.name,
            *flag.short,
            nargs=flag.nargs,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
            **action,
        )


def unknown_flag_message(argument: str, known: Sequence[str]) -> str:
    """What to say about an argument no parser took; names the nearest flag if one is near."""
    name = argument.split("=", 1)[0].replace("_", "-")
    if not name.startswith("-"):
        return f"unexpected argument {argument!r}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"unknown flag {argument.split('=', 1)[0]}" + (
        f"; did you mean {near[0]}?" if near else ""
    )
