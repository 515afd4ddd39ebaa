"""The loss against its definition and torch's own gradients, in float64."""

from __future__ import annotations

import pytest
import torch

from octavo.distill.loss import match_loss, target_labels


@pytest.mark.parametrize("acceptance_weight", [0.0, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_equals_its_definition(acceptance_weight: float, temperature: float) -> None:
    torch.manual_seed(0)
    count, size, vocab, drafted = 300, 16, 60, 23
    table = torch.randn(vocab, size)
    rows = table[:drafted]
    hidden = torch.randn(count, size)
    norm = (hidden @ table.T / temperature).logsumexp(-1)
    labels = target_labels(hidden, norm, rows=rows, temperature=temperature)
    p = (hidden.double() @ table.double().T / temperature).softmax(-1)[:, :drafted]
    torch.testing.assert_close(labels.probs.double(), p, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(labels.mass.double(), p.sum(-1), rtol=1e-4, atol=1e-6)

    outputs = torch.randn(count, size, requires_grad=True)
    loss, sums = match_loss(outputs, labels, rows=rows, acceptance_weight=acceptance_weight)
    (3 * loss).backward()  # type: ignore[no-untyped-call]

    exact = outputs.detach().double().requires_grad_()
    log_q = (exact @ rows.double().T).log_softmax(-1)
    cross = -(p * log_q).sum()
    overlap = torch.minimum(p, log_q.exp()).sum()
    expected = cross + acceptance_weight * (count - overlap)
    (3 * expected).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
    assert outputs.grad is not None and exact.grad is not None
    torch.testing.assert_close(outputs.grad.double(), exact.grad, rtol=1e-3, atol=1e-4)
    same = (log_q.argmax(-1) == p.argmax(-1)).sum()
    told = torch.stack([cross.detach(), overlap.detach(), same.double()])
    torch.testing.assert_close(sums.double(), told, rtol=1e-4, atol=1e-3)


def test_mixed_precision_is_near() -> None:
    torch.manual_seed(0)
    rows, hidden = torch.randn(40, 16), torch.randn(100, 16)
    labels = target_labels(hidden, (hidden @ rows.T).logsumexp(-1), rows=rows)
    outputs = torch.randn(100, 16)
    exact, _ = match_loss(outputs, labels, rows=rows, acceptance_weight=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near, _ = match_loss(outputs, labels, rows=rows, acceptance_weight=1.0)
    assert near != exact
    torch.testing.assert_close(near, exact, rtol=2e-2, atol=0.0)
