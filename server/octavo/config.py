"""Every option of the server, one frozen dataclass per component. Knows no room that reads them.

Each field is read by code and becomes a command-line flag: ``max_num_seqs`` is ``--max-num-seqs``.
The flag's help is the field's ``help`` metadata; names are vLLM's where vLLM has the option.
"""

from __future__ import annotations

import json
import math
import types
import typing
from dataclasses import dataclass, field, fields
from typing import Any, Literal

DType = Literal["auto", "float32", "bfloat16", "float16"]
KVDType = Literal["auto", "float32", "bfloat16", "float16", "int8"]


def _opt(default: Any, text: str, **metadata: Any) -> Any:
    """A documented option. ``metadata``: ``choices``, ``metavar``, ``minimum``, ``maximum``."""
    return field(default=default, metadata={"help": text, **metadata})


def _check(config: Any) -> None:
    """Raises ValueError saying which option, what was got and what is allowed."""
    hints = typing.get_type_hints(type(config))
    for option in fields(config):
        value, meta = getattr(config, option.name), option.metadata
        kinds = [hints[option.name]]
        if isinstance(kinds[0], types.UnionType):
            kinds = list(typing.get_args(kinds[0]))
        if value is None and type(None) in kinds:
            continue
        choices = meta.get("choices")
        for kind in kinds:
            if typing.get_origin(kind) is Literal:
                choices = typing.get_args(kind)
        is_number = int in kinds or float in kinds
        what = f"{option.name} must be "
        if choices is not None:
            if value not in choices:
                raise ValueError(f"{what}one of {', '.join(map(str, choices))}, got {value!r}")
        elif is_number:
            right = (int, float) if float in kinds else (int,)
            if not isinstance(value, right) or isinstance(value, bool):
                raise ValueError(f"{what}a number, got {value!r}")
            low, high = meta.get("minimum", -math.inf), meta.get("maximum", math.inf)
            if not low <= value <= high:
                limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                raise ValueError(f"{what}{limits}, got {value!r}")
        elif bool in kinds and not isinstance(value, bool):
            raise ValueError(f"{what}True or False, got {value!r}")
        elif str in kinds and not isinstance(value, str):
            raise ValueError(f"{what}text, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model, and in what form."""

    model: str = _opt(
        "", "Hugging Face id, local folder, or .gguf file; default SmolLM2-135M-Instruct"
    )
    tokenizer: str | None = _opt(None, "folder or id of the tokenizer, if not the model's own")
    revision: str | None = _opt(None, "revision of the Hugging Face repository")
    download_dir: str | None = _opt(None, "where downloads are cached; default the hub's cache")
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = _opt(
        "auto", "dummy makes random weights from config.json alone"
    )
    dtype: DType = _opt("auto", "of weights; auto is float32 on CPU, bfloat16 on GPU")
    quantization: Literal["auto", "none", "int8", "int4", "gguf"] = _opt(
        "auto",
        "of weights, on CPU: blocks of 64 codes of 8 bits or of 32 of 4 bits, or gguf: a GGUF "
        "file's own blocks. auto is int8, the fastest, and none where a dtype is given",
    )
    device: Literal["auto", "cpu", "cuda"] = _opt("auto", "where the model runs")
    max_model_len: int | None = _opt(
        None,
        "context length in tokens (also 8k, 1K); default the model's, cut to fit the cache",
        minimum=1,
    )
    seed: int = _opt(
        0,
        "of random weights and of requests that give no seed",
        minimum=-(2**63),
        maximum=2**64 - 1,
    )
    generation_config: Literal["auto", "vllm"] = _opt(
        "auto", "auto takes sampling defaults from generation_config.json; vllm takes none"
    )
    max_logprobs: int = _opt(20, "most alternatives a request may ask for per token", minimum=0)
    num_threads: int | None = _opt(
        None, "CPU threads of the engine; default the usable cores", minimum=1
    )

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The paged K/V cache."""

    block_size: int = _opt(16, "tokens per K/V block", choices=(16, 32, 64, 128))
    kv_cache_dtype: KVDType = _opt(
        "auto",
        "of cached K and V; auto is the model's dtype, int8 beside quantised weights; int8 (on "
        "a CPU) is codes with a scale for each token and head",
    )
    kv_cache_memory_bytes: int | None = _opt(
        None, "bytes of the K/V cache (also 2GiB, 512MiB); default from free memory", minimum=1
    )
    num_gpu_blocks_override: int | None = _opt(
        None, "number of K/V blocks, whatever the device", minimum=1
    )
    gpu_memory_utilization: float = _opt(
        0.92, "share of the GPU's memory to use", minimum=0.01, maximum=1.0
    )
    enable_prefix_caching: bool = _opt(True, "reuse K/V of equal prompt beginnings")
    kv_offloading_size: float = _opt(
        0.0,
        "GiB of host memory for K/V blocks evicted from the prefix cache, which come back on a hit",
        minimum=0.0,
        maximum=2.0**20,
    )
    check_kv_invariants: bool = _opt(False, "prove after each step that no block is lost or shared")

    def __post_init__(self) -> None:
        _check(self)
        if self.kv_offloading_size and not self.enable_prefix_caching:
            raise ValueError(
                f"kv_offloading_size must be 0 without enable_prefix_caching, as nothing would be "
                f"found again, got {self.kv_offloading_size}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How the server speculates: the keys of ``--speculative-config``, vLLM's where it has them.

    ``auto``: suffix decoding, and ``model`` if one is given, as deep for each request and step as
    pays, down to none. Fixed methods draft ``num_speculative_tokens`` wherever they find as many.
    """

    method: Literal["auto", "ngram", "suffix", "eagle3", "draft_model", "off"] = _opt(
        "auto", "who drafts"
    )
    model: str | None = _opt(
        None,
        "draft_model: Hugging Face id, local folder or .gguf file of a small model of the same "
        "tokens; eagle3: of a head trained for the served model; auto: of either. Default for the "
        'last two the head that comes with Octavo for that model, if there is one; "" = none, auto',
    )
    parallel_drafting: bool | None = _opt(
        None,
        "of heads: all drafts of a step in one pass, for which a head must have been trained; "
        "default where it was",
    )
    num_speculative_tokens: int = _opt(
        8, "most drafts of one request in a step", minimum=1, maximum=64
    )
    prompt_lookup_min: int = _opt(
        2, "ngram: tokens at least that must have occurred before", minimum=1, maximum=32
    )
    prompt_lookup_max: int = _opt(5, "ngram: and at most are compared", minimum=1, maximum=32)
    suffix_decoding_max_spec_factor: float = _opt(
        1.0, "suffix: drafts for each token that matched", minimum=0.01, maximum=64.0
    )
    suffix_decoding_min_token_prob: float = _opt(
        0.1, "suffix: least estimated chance of a draft", minimum=0.0, maximum=1.0
    )
    suffix_decoding_max_cached_tokens: int = _opt(
        65536,
        "suffix: tokens of recent outputs to draft from; 0 = the request's own alone",
        minimum=0,
    )

    def __post_init__(self) -> None:
        _check(self)
        takes_model = self.method in ("auto", "eagle3", "draft_model")
        is_named = bool(self.model) or (self.model == "" and self.method == "auto")
        if self.model is not None and not (takes_model and is_named):
            raise ValueError(
                "model must be a name, of a head or a draft model, with the methods auto, eagle3 "
                f"and draft_model alone, got {self.model!r} with {self.method}"
            )
        if self.method == "draft_model" and self.model is None:
            raise ValueError(f"model must be given with method {self.method}, got none")
        if self.parallel_drafting is not None and not self.model:
            raise ValueError("parallel_drafting is of a head, which model names, got no model")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min must be at most prompt_lookup_max={self.prompt_lookup_max}, "
                f"got {self.prompt_lookup_min}"
            )

    @staticmethod
    def from_json(text: str) -> SpeculativeConfig:
        """From a JSON object, or nothing. Raises ValueError naming the key that is wrong."""
        try:
            given = json.loads(text or "{}")
        except ValueError as error:
            raise ValueError(f"speculative_config must be JSON: {error}, got {text!r}") from None
        if not isinstance(given, dict):
            raise ValueError(f"speculative_config must be a JSON object, got {text!r}")
        known = [option.name for option in fields(SpeculativeConfig)]
        for name in given:
            if name not in known:
                raise ValueError(
                    f"speculative_config has no key {name!r}; there are {', '.join(known)}"
                )
        try:
            return SpeculativeConfig(**given)
        except ValueError as error:
            raise ValueError(f"speculative_config: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What runs in a step."""

    max_num_seqs: int = _opt(256, "most requests running at once", minimum=1, maximum=65536)
    max_num_batched_tokens: int | None = _opt(
        None, "most tokens in one step; default by device", minimum=1
    )
    scheduling_policy: Literal["fcfs", "priority"] = _opt("fcfs", "order of waiting requests")
    long_prefill_token_threshold: int = _opt(
        0, "most prompt tokens of one request in a step; 0 = no such limit", minimum=0
    )
    async_scheduling: bool = _opt(True, "schedule a step while the one before it runs")
    max_num_queued_reqs: int | None = _opt(
        None,
        "reject (503) requests when this many are already waiting; default no limit",
        minimum=0,
    )
    speculative_config: str = _opt(
        "",
        'JSON such as {"method": "ngram", "num_speculative_tokens": 5}; methods are auto, suffix, '
        "ngram, eagle3, draft_model and off; default auto on CPU. On a GPU: ngram, auto and off, "
        "the default",
        metavar="JSON",
    )
    enforce_eager: bool = _opt(False, "capture no CUDA graphs: launch every step by its kernels")
    cudagraph_capture_sizes: tuple[int, ...] = _opt(
        (), "tokens of the steps that get a CUDA graph; default 1 to 512 in growing distances"
    )
    max_cudagraph_capture_size: int | None = _opt(
        None, "largest step that gets a CUDA graph; default 512", minimum=1
    )

    def __post_init__(self) -> None:
        _check(self)
        SpeculativeConfig.from_json(self.speculative_config)
        sizes, largest = self.cudagraph_capture_sizes, self.max_cudagraph_capture_size
        for size in sizes:
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(
                    f"cudagraph_capture_sizes must be whole numbers of at least 1, got {size!r}"
                )
        if sizes and largest is not None and max(sizes) != largest:
            raise ValueError(
                "max_cudagraph_capture_size must be the largest of cudagraph_capture_sizes "
                f"({max(sizes)}) where both are given, got {largest}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The HTTP front end."""

    host: str = _opt("0.0.0.0", "address to listen on")
    port: int = _opt(8000, "port to listen on", minimum=0, maximum=65535)
    uds: str | None = _opt(None, "Unix socket path to listen on instead of host and port")
    served_model_name: tuple[str, ...] = _opt(
        (), "names clients may use; the first is shown. Default the model as given"
    )
    api_key: tuple[str, ...] = _opt(
        (), "keys clients must send as a bearer token; also OCTAVO_API_KEY or VLLM_API_KEY"
    )
    allowed_origins: tuple[str, ...] = _opt((), "CORS origins; '*' for all")
    allowed_methods: tuple[str, ...] = _opt(("*",), "CORS methods")
    allowed_headers: tuple[str, ...] = _opt(("*",), "CORS headers")
    allow_credentials: bool = _opt(False, "CORS credentials")
    ssl_keyfile: str | None = _opt(None, "TLS private key (PEM)")
    ssl_certfile: str | None = _opt(None, "TLS certificate (PEM)")
    ssl_ca_certs: str | None = _opt(None, "TLS authorities to trust for client certificates")
    root_path: str = _opt("", "path prefix set by a proxy")
    chat_template: str | None = _opt(None, "Jinja chat template: a file, or the template itself")
    response_role: str = _opt("assistant", "role of chat answers")
    max_body_bytes: int = _opt(16 * 2**20, "largest request body", minimum=1)
    enable_request_id_headers: bool = _opt(True, "answer with an X-Request-Id header")
    disable_fastapi_docs: bool = _opt(False, "no /docs and /openapi.json")
    uvicorn_log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] = _opt(
        "info", "of the HTTP server's own log"
    )
    disable_uvicorn_access_log: bool = _opt(False, "no line per HTTP request")
    enable_log_requests: bool = _opt(False, "log each request's parameters")
    disable_log_stats: bool = _opt(False, "no periodic throughput line")
    shutdown_timeout: float = _opt(
        30.0, "seconds running requests may take to end at shutdown", minimum=0.0
    )
    api_server_count: int | None = _opt(
        None,
        "HTTP processes over the one engine; default 1, on a GPU one for each 8 usable cores, "
        "at most 4",
        minimum=1,
        maximum=256,
    )
    timeout_keep_alive: int = _opt(75, "seconds an idle HTTP connection is kept", minimum=0)

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the engine process needs; what `octavo.LLM` takes as keyword arguments."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
