"""The figures of a run: ticks at whole steps, KL readable to a nat, axes named in words."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import demo
import train_distill
import train_dpo
import train_grpo
import train_ppo
import train_prm
import train_rm
import train_sft
from nanorlhf.look import __main__ as look
from nanorlhf.look import plots
from nanorlhf.run.log import read_rows

TRAINERS = [train_sft, train_rm, train_prm, train_ppo, train_grpo, train_dpo, train_distill]


def drawn(monkeypatch, owner, draw):
    """The figure that a function hands to `save_figure`; laying it out would take a second."""
    figures = []
    monkeypatch.setattr(owner, "save_figure", lambda fig, path: figures.append(fig))
    draw()
    (fig,) = figures
    plt.close(fig)
    return fig


def table(path, columns, steps, value=lambda step: float(step)):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [",".join([str(step)] + [str(value(step))] * (len(columns) - 1)) for step in range(steps)]
    path.write_text("\n".join([",".join(columns), *rows]) + "\n")


def inside(axis):
    low, high = sorted(axis.get_view_interval())
    return [tick for tick in axis.get_ticklocs() if low <= tick <= high]


@pytest.mark.parametrize("trainer, steps", [(train_ppo, 1), (train_ppo, 2), *((t, 3) for t in TRAINERS)],
                         ids=lambda x: getattr(x, "__name__", x))  # fmt: skip
def test_curves(trainer, steps, tmp_path, monkeypatch):
    table(tmp_path / "metrics.csv", trainer.COLUMNS, steps)
    rows = read_rows(tmp_path)
    fig = drawn(monkeypatch, plots, lambda: plots.plot_curves(tmp_path, rows, trainer.PANELS))
    panels = [ax for ax in fig.axes if ax.lines]
    assert len(panels) >= 2
    for ax in panels:
        ticks = inside(ax.xaxis)
        assert ticks and all(tick == round(tick) for tick in ticks), f"half a step: {ticks}"
        label = ax.get_ylabel()
        assert label in plots.WORDS.values() and "_" not in label and ax.get_xlabel() == "step"


@pytest.mark.parametrize("high", [0.01, 4.7, 10.5, 210.0])
def test_kl_is_readable_to_a_nat(high, tmp_path, monkeypatch):
    table(tmp_path / "metrics.csv", ["step", "kl"], 9, lambda step: high * step / 8 - 0.001)
    rows = read_rows(tmp_path)
    (ax, *_) = drawn(monkeypatch, plots, lambda: plots.plot_curves(tmp_path, rows, ["kl"])).axes
    low, top = ax.get_ylim()
    assert low < -0.001 and top >= high - 0.001  # nothing is cut off
    ticks = inside(ax.yaxis)
    if high >= 2:
        assert ticks[: min(int(high), 10) + 1] == list(range(min(int(high), 10) + 1))
        pixels = [ax.transData.transform((0, tick))[1] for tick in ticks]
        assert min(b - a for a, b in zip(pixels, pixels[1:])) > 8  # points: two labels do not touch
        assert [label.get_text() for label in ax.get_yticklabels()] == [str(tick) for tick in ticks]


def test_report(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "gold_along", lambda folder: {0: -0.8, 1: 0.5, 2: -2.0})
    for run, high in (("ppo", 4.0), ("ppo_nokl", 180.0)):
        table(tmp_path / run / "metrics.csv", train_ppo.COLUMNS, 3, lambda step, high=high: high * step / 2)
    table(tmp_path / "sft/metrics.csv", train_sft.COLUMNS, 3)
    table(tmp_path / "rm/metrics.csv", train_rm.COLUMNS, 3)
    fig = drawn(monkeypatch, demo, lambda: demo.draw(str(tmp_path)))
    titles = {ax.get_title(): ax for ax in fig.axes}
    assert len(titles) == 8
    for title, ax in titles.items():
        assert ax.get_ylabel() and ax.get_xlabel() and ax.get_legend() is not None
        if "√KL" not in title:
            assert all(tick == round(tick) for tick in inside(ax.xaxis))
    legend = titles["over-optimisation: proxy and gold"].get_legend()
    assert "proxy: the reward model's score" in legend.get_title().get_text()
    assert "gold: the hidden judge's" in legend.get_title().get_text()
    ticks = inside(titles["KL to the SFT model"].yaxis)
    assert ticks[:11] == list(range(11)) and ticks[11:] == [20, 50, 100]


# ------------------------------------------------------------------------------------------------------------
# many runs


def run_folder(path, columns, steps, config, value):
    table(path, columns, steps, value)
    (path.parent / "config.json").write_text(json.dumps(config))
    return str(path.parent)


@pytest.fixture
def six_runs(tmp_path):
    """Two values of --beta, three seeds each; a value is seed + step, and each starts from its seed's SFT."""
    folders = []
    for beta in (0.0, 0.3):
        for seed in (0, 3, 10):
            name = tmp_path / f"beta{beta}-{seed}"
            config = {"seed": seed, "out": str(name), "init": f"runs/s{seed}/sft/model", "beta": beta}
            columns = ["step", "reward", "kl"]
            path = name / "metrics.csv"
            folders.append(run_folder(path, columns, 4, config, lambda step, seed=seed: float(seed + step)))
    return folders


def test_runs_that_differ_by_seed_are_one_curve(six_runs, tmp_path):
    """The oracle by hand: mean of 0, 3, 10 is 13/3; their deviation 5.13; t = 4.303: ± 12.75."""
    runs = {folder: (read_rows(folder), plots.read_json(f"{folder}/config.json")) for folder in six_runs}
    groups = plots.group_runs(runs)
    assert list(groups) == ["beta 0.0 (3 seeds)", "beta 0.3 (3 seeds)"]
    fig = plots.compare(groups, ["reward", "kl"])
    plt.close(fig)
    line = fig.axes[0].lines[0]
    assert line.get_ydata() == pytest.approx([13 / 3 + t for t in range(4)])
    band = fig.axes[0].collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx((13 / 3 - 12.75, 13 / 3 + 3 + 12.75), abs=0.01)
    assert [ax.get_title() for ax in fig.axes if ax.lines] == ["reward", "kl"]


def test_grouping_off_and_unlike_runs(six_runs):
    """Each run alone is told apart by its folder; other flags, or no config.json, are no seeds."""
    runs = {folder: (read_rows(folder), plots.read_json(f"{folder}/config.json")) for folder in six_runs}
    assert len(plots.group_runs(runs, by_seed=False)) == 6
    bare = {folder: (rows, {}) for folder, (rows, _) in runs.items()}
    assert list(plots.group_runs(bare)) == six_runs
    assert plots.without_seed({"seed": 12, "init": "a/s12/b"}) == {"init": "a/s#/b"}
    assert plots.without_seed({"seed": 1, "init": "a/sft-100"}) == {"init": "a/sft-100"}  # 1 is not in 100


def test_the_same_seed_twice_is_no_second_seed(six_runs):
    """Two runs of equal flags, of another version say: an interval over seeds would be false."""
    first, second, *_ = six_runs
    rows = read_rows(first)
    config = plots.read_json(f"{first}/config.json")
    other = plots.read_json(f"{second}/config.json")
    groups = plots.group_runs({"a": (rows, config), "b": (rows, config), "c": (rows, other)})
    assert list(groups) == ["a (2 seeds)", "b"] and [len(runs) for runs in groups.values()] == [2, 1]


def test_a_planted_link_is_not_followed(six_runs, tmp_path, capsys):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (Path(six_runs[0]) / "plot.png").symlink_to(precious)
    assert look.main(["--plot", *six_runs[:2], "--metric", "kl"]) == 2
    assert "plot.png is a link" in capsys.readouterr().err
    assert precious.read_text() == "precious"


def test_steps_that_not_all_runs_have(tmp_path):
    """A run that was stopped: the mean is drawn where there are values of all."""
    long = [{"step": t, "kl": 1.0} for t in range(9)]
    fig = plots.compare({"a": [long, long[:3]]}, ["kl"])
    plt.close(fig)
    assert list(fig.axes[0].lines[0].get_xdata()) == [0, 1, 2]


def test_plot_from_the_command_line(six_runs, tmp_path, capsys):
    look.main(["--plot", *six_runs[:2], "--metric", "reward,kl", "--out", str(tmp_path / "both")])
    assert capsys.readouterr().out.split() == [f"{tmp_path}/both.png", f"{tmp_path}/both.svg"]
    assert (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "both.svg").read_text()
    assert look.main(["--plot", six_runs[0], "--metric", "rewards"]) == 2
    assert "--metric rewards: not measured; there are kl, reward, step" in capsys.readouterr().err
    assert look.main(["--plots", six_runs[0]]) == 2
    assert "there are --doctor and --plot" in capsys.readouterr().err
