"""Starting the GPU's engine: which device, what is decided, what runs before the first request."""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.checkpoint import resolve
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.types import WorkerStats
from octavo.worker.devices import DeviceKind, choose_device
from octavo.worker.gpu import startup
from octavo.worker.gpu.graphs import GraphSizes
from octavo.worker.gpu.kv_transfer import GpuTransfer
from octavo.worker.gpu.runtime import HostRuntime
from octavo_kernels.matmul import cublas


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- which device ------------------------------------------------------------------------------


def _with_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> list[str]:
    """What is done on it, in order."""
    done: list[str] = []

    def get_device_capability() -> tuple[int, int] | None:
        done.append("context")
        return capability

    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", get_device_capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    monkeypatch.setattr(cublas, "hold_to_same_bits", lambda: done.append("hold"))
    return done


@pytest.mark.parametrize(
    ("wanted", "capability", "interprets", "kind"),
    [
        ("cpu", (9, 0), False, DeviceKind.CPU),
        ("auto", None, False, DeviceKind.CPU),
        ("auto", None, True, DeviceKind.CPU),
        ("auto", (9, 0), False, DeviceKind.CUDA),
        ("auto", (7, 5), False, DeviceKind.CPU),
        ("cuda", (8, 0), False, DeviceKind.CUDA),
        ("cuda", None, True, DeviceKind.INTERPRETED),
    ],
)
def test_device(
    wanted: str,
    capability: tuple[int, int] | None,
    interprets: bool,
    kind: DeviceKind,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _with_gpu(monkeypatch, capability)
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interprets)))
    assert choose_device(wanted) is kind


@pytest.mark.parametrize(
    ("capability", "interprets", "message"),
    [
        (None, False, "torch finds no CUDA device. There is --device cpu"),
        ((7, 5), False, "Old GPU has compute capability 7.5, kernels need 8.0"),
        ((9, 0), True, "TRITON_INTERPRET is set, which is for machines without a GPU"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_refused(
    capability: tuple[int, int] | None,
    interprets: bool,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _with_gpu(monkeypatch, capability)
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interprets)))
    with pytest.raises(ValueError, match=message):
        choose_device("cuda")


def test_cublas_is_held_before_cuda_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    done = _with_gpu(monkeypatch, (9, 0))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert choose_device("auto") is DeviceKind.CUDA
    assert done == ["hold", "context"]

    def too_late() -> None:
        raise RuntimeError("CUDA is in use")

    monkeypatch.setattr(cublas, "hold_to_same_bits", too_late)
    assert choose_device("cuda") is DeviceKind.CUDA
    assert "run on our own kernels alone: CUDA is in use" in caplog.text


def test_without_triton_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'octavo\[gpu\]'"):
        choose_device("cuda")
    assert choose_device("auto") is DeviceKind.CPU


@pytest.mark.parametrize("is_first", [True, False])
def test_memory_of_an_engine_before_is_given_back_first(
    is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def free() -> tuple[int, int]:
        done.append("free")
        return 1 << 30, 1 << 31

    monkeypatch.setattr(startup, "CudaRuntime", HostRuntime)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0 if is_first else 1 << 29)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty"))
    monkeypatch.setattr(gc, "collect", lambda: done.append("collect"))
    assert startup.start_device(is_interpreted=False).free_bytes == 1 << 30
    assert done == (["free"] if is_first else ["collect", "empty", "free"])


# ---- what is decided ---------------------------------------------------------------------------

_DEVICE = startup.start_device(is_interpreted=True)


def _config(folder: Path, **scheduler: Any) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(
            model=str(folder), load_format="dummy", dtype="float32", max_model_len=32
        ),
        cache=CacheConfig(num_gpu_blocks_override=4, kv_offloading_size=2**-16),
        scheduler=SchedulerConfig(**{"max_num_seqs": 2, "max_num_batched_tokens": 24, **scheduler}),
    )


def test_plan(model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = _config(model_folder, cudagraph_capture_sizes=(1, 16, 32))
    plan = startup.make_plan(config, spec=resolve(config.model).spec, device=_DEVICE)
    sizes = plan.memory.sizes
    assert (sizes.max_num_seqs, sizes.max_num_tokens) == (2, 24)
    assert (sizes.max_model_len, sizes.num_blocks) == (32, 4)
    assert plan.graphs == GraphSizes(decode=(1, 2), mixed=(16,), sampling=(1, 2))
    assert "no graphs of [32] tokens: a step has at most 24" in caplog.text
    assert plan.num_host_slots == plan.cache.num_host_slots > 0
    assert plan.cache.num_blocks == 4


def test_speculation_is_planned_for(model_folder: Path) -> None:
    method = '{"method": "ngram", "num_speculative_tokens": 3}'
    config = _config(model_folder, cudagraph_capture_sizes=(1, 4), speculative_config=method)
    spec = resolve(config.model).spec
    plan = startup.make_plan(config, spec=spec, device=_DEVICE)
    assert (plan.memory.sizes.max_drafts, plan.memory.sizes.max_samples) == (3, 8)
    assert plan.graphs.depths == (1, 3) and plan.graphs.drafting == (4,)
    plain = startup.make_plan(_config(model_folder), spec=spec, device=_DEVICE)
    assert plain.memory.sizes.max_drafts == 0
    sizes = [{p.name: p.num_bytes for p in each.memory.parts} for each in (plain, plan)]
    assert sizes[1]["logits"] == 4 * sizes[0]["logits"]
    assert sizes[1]["sampler"] > sizes[0]["sampler"]
    bad = _config(model_folder, speculative_config='{"method": "suffix"}')
    with pytest.raises(ValueError, match="on a GPU must have a method of ngram, auto, off so far"):
        startup.make_plan(bad, spec=spec, device=_DEVICE)


def test_the_interpreter_captures_nothing_unasked(model_folder: Path) -> None:
    config = dataclasses.replace(_config(model_folder), cache=CacheConfig())
    plan = startup.make_plan(config, spec=resolve(config.model).spec, device=_DEVICE)
    assert plan.graphs == GraphSizes()
    assert plan.memory.parts[-1].num_bytes <= 64 << 20, "a cache for tests"


def test_too_little_free_memory_is_refused(model_folder: Path) -> None:
    config = _config(model_folder)
    full = dataclasses.replace(_DEVICE, free_bytes=1 << 10)
    with pytest.raises(ValueError, match="something else uses it"):
        startup.make_plan(config, spec=resolve(config.model).spec, device=full)


# ---- before the first request ------------------------------------------------------------------


def test_a_start_runs_the_largest_step_and_a_request(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(model_folder, max_num_batched_tokens=4)
    files = resolve(config.model)
    plan = startup.make_plan(config, spec=files.spec, device=_DEVICE)
    model = startup.load(config, files=files, plan=plan, device=_DEVICE)
    startup.prove_products(model, plan=plan)
    runner, graphs = startup.make_runner(config, model=model, plan=plan, device=_DEVICE)
    assert isinstance(runner._transfer, GpuTransfer)
    ran: list[tuple[int, int]] = []
    forward = model.forward

    def spy(token_ids: torch.Tensor, attn: Any, *rest: Any, **more: Any) -> torch.Tensor:
        ran.append((token_ids.shape[0], attn.max_query_len))
        return forward(token_ids, attn, *rest, **more)

    model.forward = spy  # type: ignore[method-assign]
    copied: list[int] = []
    monkeypatch.setattr(
        model.backend, "copy_blocks", lambda caches, **_: copied.append(len(caches))
    )
    startup.warm(runner, graphs, plan=plan, device=_DEVICE)
    assert ran == [], "the interpreter is slow, and has nothing to warm"
    startup.warm(
        runner, graphs, plan=plan, device=dataclasses.replace(_DEVICE, is_interpreted=False)
    )
    assert ran == [(4, 4), (4, 4), (1, 1)]
    assert copied == [2], "the addresses of both layers' caches are on the device by now"
    assert graphs.take_stats() == WorkerStats(), "none of it is counted"
    assert not runner._table._row_of, "the request is gone"
    assert torch.get_num_threads() == 1


# ---- kernels, while the model is loaded --------------------------------------------------------


@pytest.fixture
def warming(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[threading.Event, list[Any], dict[str, Any]]:
    """(may end, shapes it was called with, arguments of `kernels_warm`)."""
    may_end, shapes = threading.Event(), []

    def warm(shape: Any) -> None:
        shapes.append(shape)
        assert may_end.wait(30)
        if len(shapes) > 1:
            raise RuntimeError("2 kernels do not compile")

    monkeypatch.setattr(startup, "warm_kernels", warm)
    config = _config(model_folder)
    spec = resolve(config.model).spec
    device = dataclasses.replace(_DEVICE, is_interpreted=False)
    return may_end, shapes, {"config": config, "spec": spec, "device": device}


def test_kernels_are_made_while_the_model_is_loaded(
    warming: tuple[threading.Event, list[Any], dict[str, Any]],
) -> None:
    may_end, shapes, arguments = warming
    loaded = []
    with startup.kernels_warm(**arguments):
        loaded.append("model")
        may_end.set()
    assert loaded and (shapes[0].hidden, shapes[0].vocab) == (64, 300)
    assert shapes[0].activation_dtype == torch.float32
    with (
        pytest.raises(RuntimeError, match="2 kernels do not compile"),
        startup.kernels_warm(**arguments),
    ):
        pass


def test_a_model_that_cannot_be_loaded_is_told_at_once(
    warming: tuple[threading.Event, list[Any], dict[str, Any]],
) -> None:
    may_end, _, arguments = warming
    with pytest.raises(ValueError, match="no such tensor"), startup.kernels_warm(**arguments):
        raise ValueError("no such tensor")
    may_end.set()
