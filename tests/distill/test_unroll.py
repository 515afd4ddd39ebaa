"""Drafting at all places at once against drafting place by place, written out in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from octavo.distill.head import DraftHead
from octavo.distill.unroll import Features, unroll


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


@pytest.mark.parametrize("window", [0, 4])
def test_equals_drafting_place_by_place(make_head: Callable[..., DraftHead], window: int) -> None:
    head = make_head(window=window)
    depth, num_context = 4, 3
    contexts, answers = (3, 1), (7, 5)
    torch.manual_seed(1)
    taps = torch.randn(2, num_context + 7, 96)
    embedded = torch.randn(2, num_context + 7, 32)
    is_text = torch.zeros(2, num_context + 7, dtype=torch.bool)
    for row in range(2):
        first = num_context - contexts[row]
        is_text[row, first : num_context + answers[row]] = True
    taps[~is_text] = 1e3  # what padding holds must not matter
    batch = Features(taps=taps, embedded=embedded, is_text=is_text, num_context=num_context)
    found = [out.double() for out in unroll(head, batch, depth=depth)]
    reference = Reference(head)
    for row in range(2):
        first, end = num_context - contexts[row], num_context + answers[row]
        real: list[tuple[int, Tensor, Tensor]] = []
        for start in range(first, end):
            g = reference.w["fc.weight"] @ taps[row, start].double()
            keys = list(real)
            for step in range(depth):
                place = start + step
                if place >= end:
                    break
                out, own = reference.place(embedded[row, place].double(), g, keys, place)
                if step == 0:
                    real.append(own)
                keys.append(own)
                if start >= num_context:
                    expected = reference.norm(out, "norm")
                    torch.testing.assert_close(
                        found[step][row, place - num_context], expected, rtol=1e-3, atol=1e-3
                    )
                g = out


def test_gradients_reach_every_weight(make_head: Callable[..., DraftHead]) -> None:
    head = make_head(window=4)
    batch = Features(
        taps=torch.randn(1, 6, 96),
        embedded=torch.randn(1, 6, 32),
        is_text=torch.ones(1, 6, dtype=torch.bool),
        num_context=2,
    )
    sum(out.square().sum() for out in unroll(head, batch, depth=3)).backward()  # type: ignore[union-attr]
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
