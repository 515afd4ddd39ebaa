"""``octavo bench serve``: load on a running server, by vLLM's flags and with its output.

Knows when to send what; `client` knows how, `report` what it means.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.bench.datasets import Prompt, add_dataset_flags, load_dataset
from octavo.flags import parse_int

if TYPE_CHECKING:
    import aiohttp

    from octavo.bench.client import Result, Target

HELP = "measure a running server under load"
_BACKENDS = ("openai", "vllm", "openai-chat")
_SAMPLING = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty")
_METRICS = ("ttft", "tpot", "itl", "e2el")
_GOODPUT = ("ttft", "tpot", "e2el")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--backend", "--endpoint-type", choices=_BACKENDS, default="openai", help="the kind of API")
    add("--base-url", help="such as http://127.0.0.1:8000; default from --host and --port")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--endpoint", help="path; default that of the backend")
    add("--header", action="append", default=[], metavar="KEY=VALUE", help="sent along")
    add("--insecure", action="store_true", help="do not check the server's certificate")
    add("--model", help="name to ask for; default the server's first")
    add("--served-model-name", help="name to ask for, where --model names the files")
    add("--tokenizer", help="folder or id; default the model's")
    add("--label", help="kept in the result; default the backend")
    load = parser.add_argument_group("load")
    load.add_argument("--request-rate", type=float, default=math.inf, help="per second; inf = all")
    load.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        help="of arrivals: 1 is a Poisson process, less is burstier, more is more even",
    )
    load.add_argument("--max-concurrency", type=parse_int, help="most requests under way at once")
    load.add_argument("--num-warmups", type=parse_int, default=0, help="requests not measured")
    load.add_argument(
        "--ready-check-timeout-sec", type=float, default=60.0, help="to wait for the server"
    )
    load.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    requests = parser.add_argument_group("requests")
    requests.add_argument("--ignore-eos", action="store_true", help="generate to the full length")
    requests.add_argument("--logprobs", type=int, help="alternatives per token to ask for")
    requests.add_argument("--request-id-prefix", default="", help="of X-Request-Id")
    requests.add_argument("--extra-body", type=json.loads, default={}, metavar="JSON")
    for name in (*_SAMPLING, "repetition_penalty"):
        requests.add_argument("--" + name.replace("_", "-"), type=float)
    requests.add_argument("--top-k", type=int)
    add_dataset_flags(parser)
    _add_result_flags(parser)


def _add_result_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("results").add_argument
    add("--percentile-metrics", default="ttft,tpot,itl", help="of ttft, tpot, itl, e2el")
    add("--metric-percentiles", default="99", help="such as 50,90,99.9; default 99")
    add("--goodput", nargs="+", default=[], metavar="METRIC:MS", help="such as ttft:200 tpot:50")
    add("--save-result", action="store_true", help="write a JSON file")
    add("--save-detailed", action="store_true", help="with each request's times and text")
    add("--append-result", action="store_true", help="add a line to the file")
    add("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="kept in the result")
    add("--result-dir", default=".", help="default here")
    add("--result-filename", help="default from backend, rate, model and time")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `args` ask for, checked."""

    metrics: tuple[str, ...]
    percentiles: tuple[float, ...]
    goodput: Mapping[str, float]
    metadata: Mapping[str, str]
    headers: Mapping[str, str]

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Plan:
        """Raises ValueError naming the flag."""
        metrics = tuple(m.strip() for m in args.percentile_metrics.split(",") if m.strip())
        if unknown := set(metrics) - set(_METRICS):
            raise ValueError(
                f"--percentile-metrics: {', '.join(sorted(unknown))}: not one of "
                f"{', '.join(_METRICS)}"
            )
        try:
            percentiles = tuple(float(p) for p in args.metric_percentiles.split(","))
        except ValueError:
            percentiles = (-1.0,)
        if not all(0 <= p <= 100 for p in percentiles):
            raise ValueError(
                f"--metric-percentiles must be numbers from 0 to 100, got "
                f"{args.metric_percentiles!r}"
            )
        if not args.request_rate > 0 or not args.burstiness > 0:
            raise ValueError("--request-rate and --burstiness must be above 0")
        if args.max_concurrency is not None and args.max_concurrency < 1:
            raise ValueError(f"--max-concurrency must be at least 1, got {args.max_concurrency}")
        if not isinstance(args.extra_body, dict):
            raise ValueError("--extra-body must be a JSON object")
        goodput: dict[str, float] = {}
        for name, limit in _pairs(args.goodput, ":", "--goodput").items():
            try:
                goodput[name] = float(limit)
            except ValueError:
                goodput[name] = -1.0
            if name not in _GOODPUT or goodput[name] < 0:
                raise ValueError(
                    f"--goodput takes METRIC:MILLISECONDS with a metric of "
                    f"{', '.join(_GOODPUT)}, got {name}:{limit}"
                )
        return cls(
            metrics=metrics,
            percentiles=percentiles,
            goodput=goodput,
            metadata=_pairs(args.metadata, "=", "--metadata"),
            headers=_pairs(args.header, "=", "--header"),
        )


def _pairs(items: Sequence[str], separator: str, flag: str) -> dict[str, str]:
    pairs = {}
    for item in items:
        key, found, value = item.partition(separator)
        if not found or not key:
            raise ValueError(f"{flag}: expected KEY{separator}VALUE, got {item!r}")
        pairs[key] = value
    return pairs


def run(args: argparse.Namespace) -> int:
    plan = Plan.from_args(args)
    return asyncio.run(_run(args, plan))


async def _run(args: argparse.Namespace, plan: Plan) -> int:
    # Lazy: `octavo --help` must not pay for aiohttp and numpy.
    from octavo.bench.client import open_session
    from octavo.bench.report import as_json, render, summarize
    from octavo.bench.tokenizers import load_tokenizer
    from octavo.cli.options import environment_api_key

    base_url = (args.base_url or f"http://{args.host}:{args.port}").rstrip("/")
    headers = dict(plan.headers)
    if (key := environment_api_key()) is not None:
        headers.setdefault("Authorization", f"Bearer {key}")
    async with open_session(headers, verify_tls=not args.insecure) as session:
        found = await _find_model(session, base_url, timeout=args.ready_check_timeout_sec)
        model = args.served_model_name or args.model or found.id
        tokenizer_id = args.tokenizer or args.model or found.root
        print(f"model {model}, tokenizer {tokenizer_id}, data set {args.dataset_name}")
        prompts = load_dataset(args, load_tokenizer(tokenizer_id))
        target = _target(args, base_url=base_url, model=model)
        await _warm_up(session, target, prompts, args)
        started = datetime.now().strftime("%Y%m%d-%H%M%S")
        results, duration = await measure(
            session,
            target,
            prompts,
            request_rate=args.request_rate,
            burstiness=args.burstiness,
            max_concurrency=args.max_concurrency,
            seed=args.seed,
            has_bar=not args.disable_tqdm,
        )
    summary = summarize(results, duration=duration, goodput=plan.goodput)
    print(
        render(
            summary,
            metrics=plan.metrics,
            percentiles=plan.percentiles,
            max_concurrency=args.max_concurrency,
            request_rate=args.request_rate,
        )
    )
    _print_errors(results)
    measured = as_json(
        summary,
        results,
        metrics=plan.metrics,
        percentiles=plan.percentiles,
        is_detailed=args.save_detailed,
    )
    if args.save_result or args.save_detailed or args.append_result:
        configured = _configured(args, plan, model=model, tokenizer_id=tokenizer_id, date=started)
        _save(args, configured | measured, model=model, date=started)
    return 0 if summary.completed else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    id: str
    root: str


async def _find_model(session: aiohttp.ClientSession, base_url: str, *, timeout: float) -> _Model:
    """The server's first model; waits up to `timeout` seconds for the server to be there."""
    import aiohttp

    deadline = time.monotonic() + timeout
    while True:
        try:
            async with session.get(base_url + "/v1/models") as response:
                if response.status == 200:
                    card = (await response.json())["data"][0]
                    return _Model(id=card["id"], root=card.get("root") or card["id"])
                problem = f"HTTP {response.status} for GET /v1/models"
                if response.status < 500:
                    raise ValueError(f"{base_url}: {problem}: {await response.text()}")
        except aiohttp.ClientError as error:
            problem = str(error)
        if time.monotonic() >= deadline:
            raise ValueError(f"no server answers at {base_url}: {problem}")
        await asyncio.sleep(0.25)


def _target(args: argparse.Namespace, *, base_url: str, model: str) -> Target:
    from octavo.bench.client import ENDPOINTS, Target  # lazy, as in _run

    return Target(
        url=base_url + (args.endpoint or ENDPOINTS[args.backend]),
        is_chat=args.backend == "openai-chat",
        model=model,
        body=_sampling(args) | args.extra_body,
        ignore_eos=args.ignore_eos,
        logprobs=args.logprobs,
        request_id_prefix=args.request_id_prefix,
    )


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    names = (*_SAMPLING, "repetition_penalty", "top_k")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


async def _warm_up(
    session: aiohttp.ClientSession,
    target: Target,
    prompts: Sequence[Prompt],
    args: argparse.Namespace,
) -> None:
    """One request alone, which must succeed, then ``--num-warmups`` more at once."""
    from octavo.bench.client import send

    first = await send(session, target, prompts[0], intended=time.monotonic())
    if not first.is_success:
        raise ValueError(f"the first request failed, nothing is measured: {first.error}")
    limit = asyncio.Semaphore(args.max_concurrency or max(1, args.num_warmups))

    async def one(prompt: Prompt) -> None:
        async with limit:
            await send(session, target, prompt, intended=time.monotonic())

    chosen = [prompts[i % len(prompts)] for i in range(args.num_warmups)]
    await asyncio.gather(*(one(prompt) for prompt in chosen))


def arrivals(count: int, *, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which requests are meant to be sent.

    Gaps are gamma-distributed (`burstiness` is the shape; 1 is Poisson) and scaled so that the
    last of `count` comes at ``count / rate``, as vLLM does: the offered rate is the asked one.
    """
    if math.isinf(rate):
        return [0.0] * count
    rng = random.Random(seed)
    times: list[float] = []
    now = 0.0
    for _ in range(count):
        now += rng.gammavariate(burstiness, 1 / (rate * burstiness))
        times.append(now)
    scale = count / rate / now
    return [t * scale for t in times]


async def measure(
    session: aiohttp.ClientSession,
    target: Target,
    prompts: Sequence[Prompt],
    *,
    request_rate: float,
    burstiness: float = 1.0,
    max_concurrency: int | None = None,
    seed: int = 0,
    has_bar: bool = False,
) -> tuple[list[Result], float]:
    """Sends every prompt at its time; the results in the prompts' order, and the seconds it took.

    With a finite rate a request that waits for a free place counts its waiting from its arrival.
    With an infinite rate and a limit there is no arrival: so many users send one after the other.
    """
    from tqdm import tqdm

    from octavo.bench.client import send

    limit = asyncio.Semaphore(max_concurrency or len(prompts))
    offsets = arrivals(len(prompts), rate=request_rate, burstiness=burstiness, seed=seed)
    start = time.monotonic()
    is_closed_loop = math.isinf(request_rate) and max_concurrency is not None
    with tqdm(total=len(prompts), disable=not has_bar, file=sys.stderr) as bar:

        async def one(index: int, prompt: Prompt) -> Result:
            intended = start + offsets[index]
            async with limit:
                if is_closed_loop:
                    intended = time.monotonic()
                result = await send(session, target, prompt, intended=intended, index=index)
            bar.update()
            return result

        tasks = []
        for index, prompt in enumerate(prompts):
            if (wait := start + offsets[index] - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(index, prompt)))
        results = await asyncio.gather(*tasks)
    return list(results), time.monotonic() - start


def _print_errors(results: Sequence[Result]) -> None:
    counts: dict[str, int] = {}
    for result in results:
        if not result.is_success:
            counts[result.error] = counts.get(result.error, 0) + 1
    for error, count in sorted(counts.items(), key=lambda item: -item[1])[:5]:
        print(f"{count} failed: {error}", file=sys.stderr)


def _configured(
    args: argparse.Namespace, plan: Plan, *, model: str, tokenizer_id: str, date: str
) -> dict[str, Any]:
    return {
        "date": date,
        "endpoint_type": args.backend,
        "backend": args.backend,
        "label": args.label,
        "model_id": model,
        "tokenizer_id": tokenizer_id,
        "num_prompts": args.num_prompts,
        **plan.metadata,
        "request_rate": "inf" if math.isinf(args.request_rate) else args.request_rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
    }


def _save(args: argparse.Namespace, result: dict[str, Any], *, model: str, date: str) -> None:
    label = args.label or args.backend
    limit = f"-concurrency{args.max_concurrency}" if args.max_concurrency is not None else ""
    name = f"{label}-{args.request_rate}qps{limit}-{model.split('/')[-1]}-{date}.json"
    path = Path(args.result_dir) / (args.result_filename or name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if args.append_result else "w", encoding="utf-8") as file:
        if args.append_result and file.tell():
            file.write("\n")
        json.dump(result, file)
    print(f"result in {path}")
