"""The lab on scaling: its fit finds what the data were made of, and says when it cannot."""

import pytest
import torch

from labs import scaling

TRUE = dict(A=0.95, B=1.9, C_mid=10.0)


def curve(C, R0=0.4):
    """The same law, written as odds: (R − R0) / (A − R) = (C / C_mid)^B."""
    odds = (C / TRUE["C_mid"]) ** TRUE["B"]
    return (R0 + TRUE["A"] * odds) / (1 + odds)


def test_fit_finds_the_parameters_of_exact_data():
    C = torch.linspace(2, 60, 30).double()
    found = scaling.fit(C, curve(C), 0.4)
    assert [x.item() for x in found] == pytest.approx(list(TRUE.values()), rel=0.03)
    assert torch.allclose(scaling.sigmoid(C, 0.4, *found), curve(C), atol=4e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUE)
def test_intervals_hold_the_truth_in_19_of_20_draws(name):
    C, noise = torch.linspace(2, 60, 30).double(), torch.Generator().manual_seed(0)
    which, inside = list(TRUE).index(name), []
    for draw in range(20):
        R = curve(C) + 0.008 * torch.randn(len(C), generator=noise).double()
        low, high = scaling.bootstrap(C, R, 0.4, seed=draw)[which].tolist()
        inside.append(low <= TRUE[name] <= high)
        assert 0 < high - low < TRUE[name]
    assert sum(inside) >= 19


def test_a_run_that_ends_early_does_not_identify_its_ceiling():
    """Half the curve: up to C_mid its ceiling may be anything, and study says so."""
    noise = torch.Generator().manual_seed(0)

    def rows(most):
        C = torch.cat([torch.zeros(1), torch.linspace(most / 20, most, 20)]).double()
        R = torch.cat([torch.tensor([0.4]).double(), curve(C[1:])])
        R += 0.008 * torch.randn(len(C), generator=noise).double() * (C > 0)
        return [{"flop": c, "reward": r} for c, r in zip(C.tolist(), R.tolist())]

    assert not scaling.study(rows(10))["known"]
    long = scaling.study(rows(60))
    assert long["known"] and long["error"] < 0.02 and abs(long["A"] - TRUE["A"]) < 0.02
