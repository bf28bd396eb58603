"""The lab on entropy: its fit, what it predicts, and which way its effects point."""

import math

import pytest

from labs import common, entropy
from nanorlhf.errors import UserError


def planted(a=0.4, b=0.9, seed=0.0, method="GRPO", shift=0.0):
    """A run on the law, whose entropy falls by a tenth at each of nine measurements."""
    heights = [0.7 * 0.9**i + shift for i in range(9)]
    return [{"seed": seed, "method": method, "step": float(i), "entropy": h, "accuracy": b - a * math.exp(h)}
            for i, h in enumerate(heights)]  # fmt: skip


def test_law_is_recovered_and_predicts_what_it_was_not_fitted_to():
    rows = planted()
    first, rest = entropy.cut(rows)
    assert len(first) == 3 and first + rest == rows
    points = (entropy.column(first, name) for name in ("entropy", "accuracy"))
    assert entropy.fit(*points) == pytest.approx((0.4, 0.9))
    found = entropy.errors(rows)
    assert found["law"] == pytest.approx(0, abs=1e-9)
    late = [r["accuracy"] - first[-1]["accuracy"] for r in rest]
    assert found["constant"] == pytest.approx(sum(late) / 6) and found["line"] > 1e-3


def test_effects_point_the_predicted_way():
    """Twice 0.05 off in the rest, up and down, is a mean error of 0.05: 0.02 above what is allowed."""
    rows = planted() + planted(seed=1.0)
    for i, row in enumerate(rows[3:9]):
        row["accuracy"] += 0.05 * (-1) ** i
    for method, shift in (("Clip-Cov", 0.1), ("clip-higher", -0.2)):
        rows += planted(method=method, shift=shift) + planted(seed=1.0, method=method, shift=2 * shift)
    found = entropy.effects(rows)
    assert found["0.03 − error of the law"] == pytest.approx([-0.02, 0.03])
    assert found["entropy, Clip-Cov − GRPO"] == pytest.approx([0.1, 0.2])
    assert entropy.kept(rows, "clip-higher") == pytest.approx([-0.2, -0.4])
    assert not entropy.verdict(rows)[0]


def test_a_variant_can_be_a_stage(tmp_path, monkeypatch):
    """It has no file; that it is asked for --init shows that its flags were read, --cov_share among them."""
    monkeypatch.setattr(common, "root", str(tmp_path))
    with pytest.raises(UserError, match="--init"):
        common.trained(entropy.variants.load("clip_cov"), task="countdown", init=str(tmp_path), cov_share=0.1)
