"""How steps walk over a text, and what they add up to."""

from __future__ import annotations

from octavo.distill.measure import Acceptance, walk

NO, YES = False, True


def test_steps_over_an_answer() -> None:
    # 7 tokens: the first is the prompt's own step; places 0 .. 5 guess the other six.
    right = [
        [YES, NO, NO, YES, YES, YES, NO],
        [NO, YES, YES, NO, YES, YES, NO],
    ]
    # At 0: depth 0 right, depth 1 (place 1) right: 2 accepted and one more, so on to place 3:
    # right, then (place 4) right; 3 tokens were left, of which it yields all.
    assert list(walk(right, num_tokens=7)) == [(2, 6), (2, 3)]
    assert list(walk([[NO] * 7], num_tokens=4)) == [(0, 3), (0, 2), (0, 1)]
    # The last step may draft no further than the text goes.
    assert list(walk([[YES] * 7, [YES] * 7], num_tokens=2)) == [(1, 1)]
    assert list(walk(right, num_tokens=1)) == []


def test_rates() -> None:
    found = Acceptance(
        depth=2, num_texts=1, num_steps=4, num_tokens=7, reached=(4, 2), accepted=(2, 1)
    )
    assert found.tokens_per_step == 1.75
    assert found.by_depth == (0.5, 0.5)
    assert found.to_json() == {
        "depth": 2,
        "texts": 1,
        "tokens_per_step": 1.75,
        "acceptance_by_depth": [0.5, 0.5],
    }
    assert str(found).startswith("1.750 tokens a step at depth 2, accepted by depth 0.500 0.500")
