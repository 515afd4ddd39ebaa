"""What `octavo distill` can be asked for. Knows no tensor: the command line is made of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from octavo.flags import flag_name


def _opt(default: Any, text: str, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Texts to learn from: answers of the model itself."""

    prompts: tuple[str, ...] = _opt(
        (),
        "JSON lines with 'prompt', 'text' or 'turns' (a turn is a chat message), or .txt with a "
        "prompt a line; without any the model makes up all prompts itself",
    )
    eval_prompts: tuple[str, ...] = _opt(
        (), "files alike, held out to measure acceptance; default some of the generated texts"
    )
    generated: str | None = _opt(
        None, "file of generated texts, read and added to; default generated.jsonl in the output"
    )
    num_samples: int = _opt(4096, "answers to generate", minimum=1)
    max_new_tokens: int = _opt(256, "tokens of an answer", minimum=4)
    temperatures: tuple[float, ...] = _opt(
        (0.0, 0.0, 0.8, 1.0), "of answers, each as often as the others; default 0 0 0.8 1"
    )
    draft_vocab_size: int = _opt(
        8192, "the most frequent tokens of the answers, which alone are drafted", minimum=1
    )
    num_eval_samples: int = _opt(64, "answers to measure acceptance on", minimum=1)
    cache_hidden_states: bool = _opt(
        False, "keep the model's hidden states in a file of the output folder, in float16, instead "
        "of computing them anew every epoch"
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOptions:
    """The draft head: one decoder layer on hidden states of three layers."""

    intermediate_size: int | None = _opt(
        None, "of its feed-forward network; default 16/9 of the hidden size", minimum=8
    )
    aux_layers: tuple[int, ...] = _opt(
        (), "three layers whose input it sees; default 2, the middle one and the last but two"
    )
    window: int = _opt(128, "most tokens that it sees", minimum=2)
    parallel_drafting: bool = _opt(
        False, "it guesses all tokens of a step in one pass (P-EAGLE), not one after the other"
    )
    init_from_head: str | None = _opt(
        None, "folder of a head of this model and these sizes to begin with, vocabulary included"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How it is trained; names are those of transformers' TrainingArguments."""

    learning_rate: float = _opt(1e-3, "peak of the schedule", minimum=1e-9)
    warmup_ratio: float = _opt(0.04, "share of the steps with a rising rate", maximum=0.99)
    min_lr_ratio: float = _opt(0.05, "where the cosine ends, as a share of the peak", maximum=1)
    weight_decay: float = _opt(0.01, "of matrices")
    adam_beta1: float = _opt(0.9, "AdamW's", maximum=0.9999)
    adam_beta2: float = _opt(0.95, "AdamW's", maximum=0.99999)
    max_grad_norm: float = _opt(0.5, "gradients are clipped to it", minimum=1e-9)
    num_epochs: int = _opt(3, "times that every text is seen", minimum=1)
    max_steps: int | None = _opt(None, "optimizer steps, whatever the epochs", minimum=1)
    per_device_batch_size: int = _opt(8, "texts of one pass on one device", minimum=1)
    gradient_accumulation_steps: int = _opt(1, "passes of one optimizer step", minimum=1)
    unroll_steps: int = _opt(
        4, "tokens that it drafts in a row while it learns, on its own outputs", minimum=1
    )
    unroll_decay: float = _opt(0.8, "weight of each such token relative to the one before")
    acceptance_weight: float = _opt(
        1.0, "of the chance that a draft is rejected, beside the KL divergence"
    )
    hidden_weight: float = _opt(
        1.0, "of the distance to the model's own hidden states, which fades to 0 by the end"
    )
    hidden_warmup_ratio: float = _opt(
        0.2,
        "share of the steps that learn those hidden states alone, a third of the work of a step "
        "that learns distributions",
        maximum=1,
    )
    unroll_warmup_ratio: float = _opt(
        0.5, "share of the steps that draft one token only, before --unroll-steps", maximum=1
    )
    label_temperature: float = _opt(1.0, "of the model's distributions", minimum=0.05)
    label_top_k: int = _opt(
        64, "likeliest tokens of the draft vocabulary that a place is taught", minimum=1
    )
    hidden_dropout: float = _opt(0.0, "on the features and the attention's output", maximum=0.9)
    bf16: bool = _opt(False, "mixed precision with bfloat16")
    fp16: bool = _opt(False, "mixed precision with float16 and a scaled loss")
    seed: int = _opt(0, "of prompts, answers, order and dropout")
    save_steps: int = _opt(200, "optimizer steps between checkpoints", minimum=1)
    save_total_limit: int = _opt(2, "checkpoints that are kept", minimum=1)
    logging_steps: int = _opt(20, "optimizer steps between lines of the log", minimum=1)
    eval_steps: int | None = _opt(
        None, "optimizer steps between measurements; default at the start and end only", minimum=1
    )
    measure_depth: int = _opt(4, "tokens drafted in a row when acceptance is measured", minimum=1)
    resume_from_checkpoint: str | None = _opt(
        None, "folder of a checkpoint, or latest: that of the output folder"
    )

    def __post_init__(self) -> None:
        if self.bf16 and self.fp16:
            raise ValueError("--bf16 and --fp16 exclude each other")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """All of it."""

    output: str
    data: DataConfig
    head: HeadOptions
    train: TrainConfig

    def __post_init__(self) -> None:
        for part in (self.data, self.head, self.train):
            _check(part)
        if not self.data.temperatures or min(self.data.temperatures) < 0:
            raise ValueError("--temperatures must be one or more numbers of at least 0")
        if self.head.aux_layers and len(self.head.aux_layers) != 3:
            raise ValueError(f"--aux-layers must be three, got {list(self.head.aux_layers)}")


def _check(part: Any) -> None:
    """Raises ValueError naming the flag, what was got and what is allowed."""
    for option in dataclasses.fields(part):
        value = getattr(part, option.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        low, high = option.metadata.get("minimum", 0), option.metadata.get("maximum")
        if option.name == "seed":
            continue
        if not value >= low or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{flag_name(option.name)} must be {limits}, got {value}")
