"""What two labs compute by hand: SEAL's regression within pairs, and the second language's dictionary."""

import numpy
import pytest

from labs import language_adaptation, seal
from nanorlhf import tasks


def test_imprint_is_the_regression_with_a_fixed_effect_for_each_pair():
    rng, n, k = numpy.random.default_rng(0), 50, 3
    feature = rng.normal(size=(n, 2, k))
    reward = feature @ [1.0, 0.0, -0.5] + rng.normal(size=(n, 1)) + 0.3 * rng.normal(size=(n, 2))
    beta, se, inflation = seal.imprint(reward, feature)
    own = (feature / feature.std((0, 1))).reshape(-1, k)
    x, y = numpy.hstack([own, numpy.kron(numpy.eye(n), [[1.0], [1.0]])]), reward.flatten() / reward.std()
    found = numpy.linalg.lstsq(x, y, rcond=None)[0]
    assert beta == pytest.approx(found[:k])
    scores = [x[i : i + 2].T @ (y - x @ found)[i : i + 2] for i in range(0, 2 * n, 2)]  # clustered by pair
    bread = numpy.linalg.pinv(x.T @ x)
    robust = bread @ sum(numpy.outer(s, s) for s in scores) @ bread
    assert se == pytest.approx(numpy.sqrt(numpy.diag(robust)[:k]))
    assert (inflation >= 1).all()


def test_second_language_translates_there_and_back_and_shares_no_word():
    words = language_adaptation.dictionary()
    assert not set(words) & set(words.values()) and len(set(words.values())) == len(words)
    for text in list(tasks.SENTENCES)[::50] + ["Hotel: We went on a Friday."]:
        there = language_adaptation.translate(text)
        assert there != text and language_adaptation.translate_back(there) == text
        assert set("".join(language_adaptation.translate_back(text).split())) <= set("?:.")
