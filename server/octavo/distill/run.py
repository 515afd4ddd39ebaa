"""A whole distillation: texts, hidden states, training, measurement, the folder at the end.

Puts the parts together; computes nothing itself.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from octavo.config import EngineConfig
from octavo.distill.features import (
    CachedStates,
    ComputedStates,
    StateSource,
    write_cache,
)
from octavo.distill.head import (
    DraftHead,
    HeadConfig,
    default_layers,
    load_head,
    save_head,
    start_like,
)
from octavo.distill.loss import target_labels
from octavo.distill.measure import Acceptance, measure
from octavo.distill.options import DistillConfig
from octavo.distill.ranks import Ranks, joined
from octavo.distill.samples import (
    Author,
    Sample,
    draft_vocabulary,
    generate_samples,
    read_prompts,
    read_samples,
    write_samples,
)
from octavo.distill.target import Target, load_target
from octavo.distill.trainer import Trainer, Vectors, logit_metric
from octavo.llm import LLM
from octavo.llm import engine_config as llm_config
from octavo.models import is_same_target, target_fingerprint
from octavo.worker.devices import DeviceKind, choose_device
from octavo.worker.sizing import usable_cores

_log = logging.getLogger(__name__)
_MASK_TOKEN = 0  # whichever: what it means where it stands is learned
_GENERATED, _STATES, _MEASURED = "generated.jsonl", "states", "acceptance.json"

Measured = dict[str, Acceptance]


def distill(config: DistillConfig, *, engine: Mapping[str, Any], show_bar: bool) -> Measured:
    """Trains a head for the model of the engine's options, and writes it to the output folder.

    Returns its acceptance by set of texts. Raises ValueError for options and files that cannot be
    used.
    """
    output = Path(config.output)
    # First of all: it keeps cuBLAS to the engine's bits, before anything else uses CUDA.
    kind = choose_device(engine_config(engine).model.device)
    with joined(on_gpu=kind is DeviceKind.CUDA) as ranks:
        if ranks.is_first:
            output.mkdir(parents=True, exist_ok=True)
            _write_texts(config, engine=engine, output=output, show_bar=show_bar)
        ranks.wait()
        generated = read_samples(_generated(config, output))
        samples, held_out = _texts(config, generated[: config.data.num_samples], output=output)
        return _train(
            config,
            engine=engine,
            ranks=ranks,
            generated=generated,
            samples=samples,
            held_out=held_out,
            show_bar=show_bar and ranks.is_first,
        )


# ---- texts -------------------------------------------------------------------------------------


def _generated(config: DistillConfig, output: Path) -> Path:
    return Path(config.data.generated) if config.data.generated else output / _GENERATED


def _eval_file(output: Path, prompts: str) -> Path:
    return output / f"eval-{Path(prompts).stem}.jsonl"


def _write_texts(
    config: DistillConfig, *, engine: Mapping[str, Any], output: Path, show_bar: bool
) -> None:
    """Has the engine write all texts that the files lack. It is gone when this returns."""
    for name in (*config.data.prompts, *config.data.eval_prompts):
        read_prompts(Path(name))  # a wrong file must be told before anything is generated
    opened: list[Author] = []

    def author() -> Author:
        if not opened:
            llm = LLM(**engine)
            opened.append(Author(llm, max_new_tokens=config.data.max_new_tokens))
        return opened[0]

    data, seed = config.data, config.train.seed
    path = _generated(config, output)
    generate_samples(author, config=data, path=path, seed=seed, show_bar=show_bar)
    for name in data.eval_prompts:
        path = _eval_file(output, name)
        if not path.is_file():
            texts = read_prompts(Path(name))[: data.num_eval_samples]
            write_samples(path, author().greedy(texts))
    opened.clear()
    gc.collect()


def _texts(
    config: DistillConfig, samples: list[Sample], *, output: Path
) -> tuple[list[Sample], dict[str, list[Sample]]]:
    """(to train on, to measure on by set)."""
    data = config.data
    if data.eval_prompts:
        return samples, {
            Path(name).stem: read_samples(_eval_file(output, name)) for name in data.eval_prompts
        }
    count = min(data.num_eval_samples, max(len(samples) // 10, 1))
    if len(samples) < 2:
        raise ValueError("--num-samples must be at least 2: one text is held out")
    return samples[:-count], {"held out": samples[-count:]}


# ---- training ----------------------------------------------------------------------------------


def _train(
    config: DistillConfig,
    *,
    engine: Mapping[str, Any],
    ranks: Ranks,
    generated: list[Sample],
    samples: list[Sample],
    held_out: dict[str, list[Sample]],
    show_bar: bool,
) -> Measured:
    output = Path(config.output)
    everything = [samples, *held_out.values()]
    target, about = _target(config, engine=engine, samples=everything)
    _use_all_cores(engine)
    head, vectors = _head(config, target=target, generated=generated, about=about)
    source = _source(
        config, target, samples, vectors=vectors, about=about, ranks=ranks, show_bar=show_bar
    )
    trainer = Trainer(
        head,
        vectors,
        samples,
        source,
        config=config.train,
        ranks=ranks,
        folder=output,
        device=target.device,
        fingerprint=about["fingerprint"],
        show_bar=show_bar,
    )
    examiner = _Examiner(trainer, target, held_out, depth=config.train.measure_depth, folder=output)
    if config.train.resume_from_checkpoint is not None:
        trainer.resume(config.train.resume_from_checkpoint)
    look = examiner.measure if ranks.is_first else _nothing
    look(trainer.step)
    began = time.monotonic()
    trainer.train(measure=look)
    found = look(trainer.step)
    if ranks.is_first:
        acceptance = {name: part.to_json() for name, part in found.items()}
        num_bytes = save_head(
            output, trainer.head, draft_ids=trainer.vectors.draft_ids, acceptance=acceptance
        )
        seconds, megabytes = time.monotonic() - began, num_bytes / 1e6
        _log.info("trained in %.0f s: a head of %.1f MB in %s", seconds, megabytes, output)
    ranks.wait()
    return found


def _source(
    config: DistillConfig,
    target: Target,
    samples: Sequence[Sample],
    *,
    vectors: Vectors,
    about: Mapping[str, Any],
    ranks: Ranks,
    show_bar: bool,
) -> StateSource:
    """Of what the head learns from."""
    window, train = config.head.window, config.train
    labeller = partial(
        target_labels,
        rows=vectors.rows,
        top_k=train.label_top_k,
        temperature=train.label_temperature,
    )
    if not config.data.cache_hidden_states:
        return ComputedStates(target, samples, window=window, labeller=labeller)
    folder = Path(config.output) / _STATES
    drafted = hashlib.sha256(vectors.draft_ids.numpy().tobytes()).hexdigest()
    if ranks.is_first:
        write_cache(
            folder,
            target,
            samples,
            window=window,
            labeller=labeller,
            top_k=min(train.label_top_k, len(vectors.draft_ids)),
            key=f"{about['fingerprint']} {target.layers} {train.label_temperature} {drafted}",
            show_bar=show_bar,
        )
    ranks.wait()
    return CachedStates(folder, samples, window=window)


class _Examiner:
    """Measures acceptance, tells it, and keeps all that was measured in a file."""

    def __init__(
        self,
        trainer: Trainer,
        target: Target,
        held_out: Mapping[str, list[Sample]],
        *,
        depth: int,
        folder: Path,
    ) -> None:
        self._trainer, self._held_out, self._depth = trainer, held_out, depth
        window = trainer.head.config.window
        self._sources = {
            name: ComputedStates(target, part, window=window) for name, part in held_out.items()
        }
        self._path = folder / _MEASURED
        self._history: list[dict[str, Any]] = []

    def measure(self, step: int) -> Measured:
        trainer, found = self._trainer, {}
        for name, part in self._held_out.items():
            source = self._sources[name]
            found[name] = measure(trainer.head, trainer.vectors, part, source, depth=self._depth)
            _log.info("step %d, %s: %s", step, name, found[name])
        entry = {name: acceptance.to_json() for name, acceptance in found.items()}
        self._history.append({"step": step, **entry})
        self._path.write_text(json.dumps(self._history, indent=1) + "\n", encoding="utf-8")
        return found


def _nothing(step: int) -> Measured:
    return {}


def engine_config(engine: Mapping[str, Any]) -> EngineConfig:
    """The configuration that `octavo.LLM` makes of the same options."""
    options = dict(engine)
    return llm_config(options.pop("model", ""), options)


def _use_all_cores(engine: Mapping[str, Any]) -> None:
    """An engine leaves torch one thread; training is torch's."""
    torch.set_num_threads(engine.get("num_threads") or usable_cores())


def _target(
    config: DistillConfig, *, engine: Mapping[str, Any], samples: Sequence[Sequence[Sample]]
) -> tuple[Target, dict[str, Any]]:
    """The teacher, and what a head says of it."""
    name, model, cache_dtype = load_target(engine_config(engine))
    spec = model.spec
    largest = max(max(sample.all_ids) for part in samples for sample in part)
    if largest >= spec.vocab_size:
        raise ValueError(
            f"--generated: the texts hold token {largest}, the model has {spec.vocab_size} tokens; "
            "they are another model's"
        )
    target = Target(
        model,
        cache_dtype=cache_dtype,
        layers=default_layers(spec.num_layers, config.head.aux_layers),
        max_len=max(len(sample.all_ids) for part in samples for sample in part),
        label_temperature=config.train.label_temperature,
    )
    return target, {
        "name": name,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "vocab_size": spec.vocab_size,
        "fingerprint": target_fingerprint(model),
    }


def _vectors(target: Target, samples: Sequence[Sample], *, draft_ids: torch.Tensor) -> Vectors:
    spec = target.model.spec
    covered = torch.zeros(spec.vocab_size, dtype=torch.bool)
    covered[draft_ids] = True
    answers = torch.tensor([i for sample in samples for i in sample.token_ids])
    _log.info(
        "%d texts, %d tokens of answers, %.2f %% of them in the draft vocabulary of %d",
        len(samples),
        len(answers),
        100 * float(covered[answers].float().mean()),
        len(draft_ids),
    )
    rows = target.output_rows(draft_ids)
    frequency = torch.bincount(answers, minlength=spec.vocab_size)[draft_ids]
    return Vectors(
        tokens=target.token_vectors(),
        rows=rows,
        draft_ids=draft_ids,
        metric=logit_metric(rows.cpu(), frequency),
    )


def _head(
    config: DistillConfig,
    *,
    target: Target,
    generated: Sequence[Sample],
    about: Mapping[str, Any],
) -> tuple[DraftHead, Vectors]:
    """A head to begin with, and what it takes from the target."""
    model, options, data = target.model, config.head, config.data
    spec = model.spec
    ids = draft_vocabulary(generated, size=data.draft_vocab_size, vocab_size=spec.vocab_size)
    draft_ids = torch.tensor(ids, dtype=torch.int64)
    wanted = HeadConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=options.intermediate_size or -(-spec.hidden_size * 16 // 9 // 8) * 8,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.rms_norm_eps,
        rope_theta=spec.rope.theta,
        vocab_size=spec.vocab_size,
        draft_vocab_size=len(draft_ids),
        max_position_embeddings=spec.max_position_embeddings,
        aux_layers=target.layers,
        window=options.window,
        mask_token_id=_MASK_TOKEN if options.parallel_drafting else None,
        target=about,
    )
    head = DraftHead(wanted, dropout=config.train.hidden_dropout)
    if options.init_from_head is None:
        start_like(head, final_norm=model.norms()[-1].float().cpu(), seed=config.train.seed)
    else:
        found, draft_ids = load_head(Path(options.init_from_head))
        _check_same(found.config, wanted)
        head.load_state_dict(found.state_dict())
    return head, _vectors(target, generated, draft_ids=draft_ids)


def _check_same(found: HeadConfig, wanted: HeadConfig) -> None:
    """Raises ValueError where training cannot go on from a head."""
    for name in HeadConfig.__dataclass_fields__:
        one, other = getattr(found, name), getattr(wanted, name)
        if name == "target":
            one, other = dict(one).get("fingerprint", ""), other["fingerprint"]
            if is_same_target(one, other):
                continue
        if one != other:
            raise ValueError(f"--init-from-head: its {name} is {one}, that asked for is {other}")
