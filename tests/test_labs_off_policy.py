"""The lab of stale samples: accuracy is read at equally many tokens, on straight lines."""

import json

import pytest

from labs import common
from labs import off_policy as lab


def rows(method, stale, points, seed=0):
    return [{"method": method, "stale": stale, "seed": seed, "tokens": t, "accuracy": a} for t, a in points]


def test_runs_are_compared_at_the_tokens_of_the_shortest():
    every = rows("CISPO", 0, [(0, 0.4), (100, 0.8), (200, 1.0)]) + rows("CISPO", 8, [(0, 0.4), (150, 0.7)])
    every += rows("token clip", 8, [(0, 0.4), (300, 1.0)])
    cases = [("CISPO", 0), ("CISPO", 8), ("token clip", 8)]
    found = lab.at_equal_tokens(every, cases)
    assert found == {c: [pytest.approx(x)] for c, x in zip(cases, (0.9, 0.7, 0.7))}
    first, second = lab.effects(every).values()
    assert first == [pytest.approx(0.0)] and second == [pytest.approx(0.05 - 0.2)]


def test_truncated_weights_are_trained_by_their_variant(tmp_path, monkeypatch, no_curves):
    """The variant is a module without a file, and its stage must not be that of the plain trainer."""
    monkeypatch.setattr(common, "root", str(tmp_path))
    found = lab.run({"method": "truncated weights", "stale": 8}, 0, True)
    assert found[0]["tokens"] == 0 < found[-1]["tokens"]
    (config,) = tmp_path.glob("_stages/train_grpo*/config.json")
    config = json.loads(config.read_text(encoding="utf-8"))
    assert config["variant"] == "tis" and config["off_policy_steps"] == 8
