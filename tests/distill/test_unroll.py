"""Drafting at all places at once against drafting place by place, written out in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from octavo.distill.head import DraftHead
from octavo.distill.unroll import Chains, Features


class Reference:
    """One text, one place after the other, keys in a list: as a server would draft."""

    def __init__(self, head: DraftHead) -> None:
        self.config = head.config
        self.w = {name: p.detach().double() for name, p in head.named_parameters()}

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean() + self.config.rms_norm_eps).sqrt() * self.w[f"{name}.weight"]

    def rotate(self, x: Tensor, place: int) -> Tensor:
        half = x.shape[-1] // 2
        steps = torch.arange(half, dtype=torch.float64) / half
        angle = place * self.config.rope_theta**-steps
        cos, sin = angle.cos(), angle.sin()
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def place(
        self, e: Tensor, g: Tensor, keys: list[tuple[int, Tensor, Tensor]], place: int
    ) -> tuple[Tensor, tuple[int, Tensor, Tensor]]:
        """Output of one place that sees ``keys`` and itself, and its own key and value."""
        config, w = self.config, self.w
        x = torch.cat(
            [self.norm(e, "midlayer.input_layernorm"), self.norm(g, "midlayer.hidden_norm")]
        )

        def heads(part: str) -> Tensor:
            return (w[f"midlayer.self_attn.{part}.weight"] @ x).view(-1, config.head_dim)

        q = self.rotate(heads("q_proj"), place)
        own = place, self.rotate(heads("k_proj"), place), heads("v_proj")
        seen = [key for key in [*keys, own] if not config.window or place - key[0] < config.window]
        group = config.num_attention_heads // config.num_key_value_heads
        parts = []
        for head in range(config.num_attention_heads):
            k = torch.stack([key[head // group] for _, key, _ in seen])
            v = torch.stack([value[head // group] for _, _, value in seen])
            weights = (k @ q[head] / config.head_dim**0.5).softmax(0)
            parts.append(weights @ v)
        a = w["midlayer.self_attn.o_proj.weight"] @ torch.cat(parts) + g
        y = self.norm(a, "midlayer.post_attention_layernorm")
        gate = torch.nn.functional.silu(w["midlayer.mlp.gate_proj.weight"] @ y)
        up = w["midlayer.mlp.up_proj.weight"] @ y
        return a + w["midlayer.mlp.down_proj.weight"] @ (gate * up), own


def expected(
    head: DraftHead, batch: Features, *, lengths: list[tuple[int, int]], depth: int
) -> dict[tuple[int, int, int], Tensor]:
    """Outputs by (text, place in its answer, depth), of texts of (context, answer) tokens."""
    reference = Reference(head)
    outputs = {}
    for row, (context, answer) in enumerate(lengths):
        first, end = batch.num_context - context, batch.num_context + answer
        real: list[tuple[int, Tensor, Tensor]] = []
        for start in range(first, end):
            g = reference.w["fc.weight"] @ batch.taps[row, start].double()
            keys = list(real)
            for step in range(depth):
                place = start + step
                if place >= end:
                    break
                e = batch.embedded[row, place].double()
                if step and batch.unknown is not None:
                    e = batch.unknown.double()
                    g = reference.w["fc.weight"] @ reference.w["mask_hidden"][0]
                out, own = reference.place(e, g, keys, place)
                if step == 0:
                    real.append(own)
                keys.append(own)
                if start >= batch.num_context:
                    outputs[row, place - batch.num_context, step] = reference.norm(out, "norm")
                g = out
    return outputs


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("mask_token_id", [None, 3])
def test_equals_drafting_place_by_place(
    make_head: Callable[..., DraftHead], window: int, share: float, mask_token_id: int | None
) -> None:
    head = make_head(window=window, mask_token_id=mask_token_id)
    depth, num_context, lengths = 4, 3, [(3, 7), (1, 5)]
    torch.manual_seed(1)
    taps = torch.randn(2, num_context + 7, 96)
    embedded = torch.randn(2, num_context + 7, 32)
    is_text = torch.zeros(2, num_context + 7, dtype=torch.bool)
    for row, (context, answer) in enumerate(lengths):
        is_text[row, num_context - context : num_context + answer] = True
    taps[~is_text] = 1e3  # what padding holds must not matter
    batch = Features(
        taps=taps,
        embedded=embedded,
        is_text=is_text,
        num_context=num_context,
        is_answer=is_text[:, num_context:],
        unknown=None if mask_token_id is None else torch.randn(32),
    )
    outputs = expected(head, batch, lengths=lengths, depth=depth)
    names = [(row, place) for row, (_, answer) in enumerate(lengths) for place in range(answer)]
    chains = Chains(head, batch)
    alive = set(names)  # by the place that each chain has come to
    for step in range(depth):
        assert [names[i] for i in chains.at.tolist()] == [n for n in names if n in alive]
        for number, found in zip(chains.at.tolist(), chains.outputs, strict=True):
            torch.testing.assert_close(
                found.double(), outputs[*names[number], step], rtol=1e-3, atol=1e-3
            )
        kept = torch.rand(len(chains.at)) < share
        alive = {
            (row, place + 1)
            for (row, place), goes_on in zip(
                [names[i] for i in chains.at.tolist()], kept.tolist(), strict=True
            )
            if goes_on and place + 1 < lengths[row][1]
        }
        chains.go_on(kept)


def one_text() -> Features:
    """Two places of context, four of an answer."""
    return Features(
        taps=torch.randn(1, 6, 96),
        embedded=torch.randn(1, 6, 32),
        is_text=torch.ones(1, 6, dtype=torch.bool),
        num_context=2,
        is_answer=torch.ones(1, 4, dtype=torch.bool),
        unknown=torch.randn(32),
    )


@pytest.mark.parametrize("mask_token_id", [None, 3])
def test_gradients_reach_every_weight(
    make_head: Callable[..., DraftHead], mask_token_id: int | None
) -> None:
    head = make_head(window=4, mask_token_id=mask_token_id)
    chains = Chains(head, one_text())
    chains.go_on(torch.ones(4, dtype=torch.bool))
    chains.go_on(torch.ones(3, dtype=torch.bool))
    chains.outputs.square().sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_no_chain_goes_on(make_head: Callable[..., DraftHead]) -> None:
    chains = Chains(make_head(), one_text())
    chains.go_on(torch.zeros(4, dtype=torch.bool))
    assert chains.outputs.shape == (0, 32)
