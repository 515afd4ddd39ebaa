"""The loss against its definition and torch's own gradients, in float64."""

from __future__ import annotations

import pytest
import torch

from octavo.distill.loss import Labels, match_loss, target_labels


@pytest.mark.parametrize("acceptance_weight", [0.0, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("top_k", [5, 23])
def test_equals_its_definition(acceptance_weight: float, temperature: float, top_k: int) -> None:
    torch.manual_seed(0)
    count, size, vocab, drafted = 300, 16, 60, 23
    table = torch.randn(vocab, size)
    rows = table[:drafted]
    hidden = torch.randn(count, size)
    norm = (hidden @ table.T / temperature).logsumexp(-1)
    labels = target_labels(hidden, norm, rows=rows, temperature=temperature, top_k=top_k)
    p = (hidden.double() @ table.double().T / temperature).softmax(-1)[:, :drafted]
    p = torch.where(p >= p.sort(-1).values[:, -top_k, None], p, 0.0)
    assert torch.equal(labels.ids[:, 0], p.argmax(-1))
    given = torch.zeros_like(p).scatter(-1, labels.ids, labels.probs.double())
    torch.testing.assert_close(given, p, rtol=1e-4, atol=1e-6)

    outputs = torch.randn(count, size, requires_grad=True)
    true_ids = torch.randint(-1, drafted, (count,))
    match = match_loss(
        outputs, labels, true_ids=true_ids, rows=rows, acceptance_weight=acceptance_weight
    )
    (3 * match.loss).backward()  # type: ignore[no-untyped-call]

    exact = outputs.detach().double().requires_grad_()
    log_q = (exact @ rows.double().T).log_softmax(-1)
    cross = -(p * log_q).sum()
    overlap = torch.minimum(p, log_q.exp()).sum()
    expected = cross + acceptance_weight * (count - overlap)
    (3 * expected).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(match.loss.double(), expected, rtol=1e-4, atol=1e-4)
    assert outputs.grad is not None and exact.grad is not None
    torch.testing.assert_close(outputs.grad.double(), exact.grad, rtol=1e-3, atol=1e-4)
    same = (log_q.argmax(-1) == p.argmax(-1)).sum()
    told = torch.stack([cross.detach(), overlap.detach(), same.double()])
    torch.testing.assert_close(match.sums.double(), told, rtol=1e-4, atol=1e-3)
    assert torch.equal(match.is_right, log_q.argmax(-1) == true_ids)


def test_mixed_precision_is_near() -> None:
    torch.manual_seed(0)
    rows, hidden = torch.randn(40, 16), torch.randn(100, 16)
    labels = target_labels(hidden, (hidden @ rows.T).logsumexp(-1), rows=rows, top_k=40)
    outputs, true_ids = torch.randn(100, 16), torch.zeros(100, dtype=torch.int64)

    def loss() -> torch.Tensor:
        match = match_loss(outputs, labels, true_ids=true_ids, rows=rows, acceptance_weight=1.0)
        return match.loss

    exact = loss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = loss()
    assert near != exact
    torch.testing.assert_close(near, exact, rtol=2e-2, atol=0.0)


def test_labels_are_split_and_joined() -> None:
    hidden, rows = torch.randn(5, 8), torch.randn(12, 8)
    labels = target_labels(hidden, (hidden @ rows.T).logsumexp(-1), rows=rows, top_k=3)
    parts = labels.split([2, 3])
    assert torch.equal(parts[1].ids, labels.ids[2:]) and torch.equal(
        parts[0].probs, labels.probs[:2]
    )
    assert torch.equal(Labels.joined(parts).probs, labels.probs)
    assert torch.equal(labels.at(torch.tensor([3])).ids, labels.ids[3:4])
