"""The lab on process rewards: its problems, its labels, and what counts as right."""

import random

import pytest

from labs import process_reward as lab


@pytest.mark.parametrize("response, labels, correct", [
    ("<14669A>|A", [1] * 8, 1),
    ("<14779B>|B", [1, 1, 0, None, None, None, None, None], 0),
    ("<14779A>|A", [1, 1, 0, None, None, None, None, None], 1),  # two slips that cancel
    ("<14669A>|B", [1] * 6 + [0, None], 0),
    ("<14669A>|>", [1] * 6 + [0], 0),  # a step that is not written cannot be wrong, but the end can
    ("<1466>|6", [1] * 4 + [0, None], 0),
    ("", [0], 0),
])  # fmt: skip
def test_labels_end_with_the_first_mistake(response, labels, correct):
    assert lab.judge("132031=", response) == labels and lab.correct("132031=", response) == correct


def test_slips_are_as_many_as_asked_for():
    """A step is off by one or two with probability 0.2; the sums go on from what was written."""
    assert lab.solve("33333333=") == "<369CFILO>|O"
    rng, off = random.Random(0), 0
    for _ in range(500):
        text = lab.solve("222222=", 0.2, rng)
        sums = [0, *(lab.SUMS.index(x) for x in text[1:7])]
        steps = [b - a - 2 for a, b in zip(sums, sums[1:])]
        assert set(steps) <= {-2, -1, 0, 1, 2} and text[-1] == text[6]
        off += sum(step != 0 for step in steps)
    assert abs(off - 600) < 4 * (3000 * 0.2 * 0.8) ** 0.5
