"""Dialogues of held-out packs that ranks share: counted once, right only if all of it is."""

from __future__ import annotations

from omni_train.evaluation.heldout import wrong_tokens


def test_parts_of_a_dialogue_are_put_together() -> None:
    # A pack of three dialogues, the second across the cut and wrong behind it; then an empty pack.
    first = [[(4, 0), (2, 0), (0, 0)], []]
    second = [[(0, 0), (3, 1), (5, 0)], []]
    assert wrong_tokens([first, second], group_size=2) == [0, 1, 0]
    # Each with packs of its own: four parts with tokens are four dialogues.
    assert wrong_tokens([first, second], group_size=1) == [0, 0, 1, 0]
    # Without supervision a dialogue is none.
    assert wrong_tokens([[[(0, 0)]]], group_size=1) == []
