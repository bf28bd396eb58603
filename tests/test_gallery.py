"""The page of the labs: Holm's correction, and that every figure of it is that of the committed results."""

import json
import math
import re
from pathlib import Path

import pytest

import labs
from labs import common, gallery, run
from nanorlhf.errors import UserError

HERE = Path(labs.__file__).parent
PAGE = (HERE / "README.md").read_text(encoding="utf-8")
REPLICATED = sorted(p.parent.name for p in HERE.glob("results/*/replication.json"))
PUBLISHED = sorted({p.parent.name for p in HERE.glob("results/*/verdict.json")} | set(REPLICATED))
NUMBER = r"[+−-]?\d+(?:\.\d+)?"

LAB = '''"""A lab whose results are written by hand."""
PAPER = "Somebody 2024, A paper (2401.12345)"
QUESTION = "Is it so?"


def effects(rows):
    return {"old label | second part": [r["y"] for r in rows]}
'''
PAGE_OF_TWO = """# Labs

<!-- labs summary --><!-- end -->

## Of one, or two?

<!-- labs two --><!-- end -->

Text stays.

## One

<!-- labs one -->stale<!-- end -->
"""


def published(name, file):
    return json.loads((HERE / "results" / name / file).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def committed():
    return gallery.load_results()


# ------------------------------------------------------------------------------------------------------------
# Holm's correction


def test_holm_by_hand():
    """Four values: 0.01 · 4, 0.02 · 3, 0.03 · 2 = 0.06 again, 0.5 · 1."""
    found = common.holm({"a": 0.5, "b": 0.01, "c": 0.03, "d": 0.02})
    assert found == pytest.approx({"b": 0.04, "d": 0.06, "c": 0.06, "a": 0.5})


def test_holm_is_monotonic_and_no_more_than_one():
    """0.01 · 3 = 0.03; 0.011 · 2 = 0.022 would be below it; 0.9 · 1 stays."""
    assert common.holm({"a": 0.01, "b": 0.011, "c": 0.9}) == pytest.approx({"a": 0.03, "b": 0.03, "c": 0.9})
    assert common.holm({"a": 0.7, "b": 0.6, "c": 0.0}) == {"a": 1.0, "b": 1.0, "c": 0.0}
    assert common.holm({"a": 0.25}) == {"a": 0.25} and common.holm({}) == {}


def test_equal_p_get_equal_adjusted_p_whatever_their_order():
    for names in ("abc", "cba", "bca"):
        found = common.holm({name: 0.02 if name < "c" else 0.1 for name in names})
        assert found == pytest.approx({"a": 0.06, "b": 0.06, "c": 0.1})


# ------------------------------------------------------------------------------------------------------------
# a page of two labs


@pytest.fixture
def two_labs(tmp_path, monkeypatch):
    """Labs `one` (two effects, one of which failed) and `two` (seen), and a page → a writer of JSON."""
    monkeypatch.setattr(run, "HERE", str(tmp_path))
    monkeypatch.setattr(labs, "__path__", [str(tmp_path)])
    (tmp_path / "README.md").write_text(PAGE_OF_TWO, encoding="utf-8")
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(LAB)
        (tmp_path / "results" / name).mkdir(parents=True)

    def write(name, file, **values):
        base = {"lab": name, "cpu_minutes": 6.04, "seeds": 3, "verdict": "a sentence.", "first_seed": 2000}
        base["command"] = f"python -m labs replicate {name}"
        (tmp_path / "results" / name / file).write_text(json.dumps(base | values))

    write("one", "verdict.json", seen=True)
    (tmp_path / "results/one/results.csv").write_text("seed,y\n0,1\n1,2\n2,3\n")
    failed = {"mean": 0.4, "half": 0.5, "p": 0.04}
    good = {"mean": 0.0123, "half": 0.0061, "p": 0.001}
    old = "old label | second part"
    write("one", "replication.json", seen=False, p=0.04, effects={"new label": good, old: failed})
    seen = {"mean": 2.0, "half": 1.0, "p": 0.00001}
    write("two", "replication.json", seen=True, p=0.00001, effects={"label": seen})
    yield write
    for name in ("one", "two"):
        run.sys.modules.pop(f"labs.{name}", None)


def test_page_of_two_labs(two_labs, tmp_path):
    assert gallery.main(["gallery"]) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "stale" not in text and "Text stays." in text
    lines = text.splitlines()
    rows = [line for line in lines if line.startswith("| [")]
    assert rows == [
        "| [two](#of-one-or-two) | label | – | seen +2.00 ± 1.00 | seen <0.0001 | 6.0, 3 |",
        "| [one](#one) | old label \\| second part | seen +2.00 ± 2.48 | not seen +0.40 ± 0.50 "
        "| not seen 0.04 | 6.0, 3 |",
    ]
    assert "**On seeds that no run had used 1 of 2 labs see their effect, and 1 still do" in text
    after_title = text.split("## One\n")[1].split("\n\n")
    assert after_title[1] == (
        "**Did not replicate:** old label | second part +0.40 ± 0.50 (exploratory +2.00 ± 2.48)."
    )
    assert "| new label |  | +0.012 ± 0.006 |" in lines
    assert "| old label \\| second part | +2.00 ± 2.48 | +0.40 ± 0.50 |" in lines
    assert "[2401.12345](https://arxiv.org/abs/2401.12345)" in text
    verdicts = [line.split(" (")[0] for line in lines if line.startswith("**Effect")]
    assert verdicts == [
        "**Effect seen** on 3 seeds, 2000 to 2002, after Holm's correction, too",
        "**Effect not seen** on 3 seeds, 2000 to 2002",
    ]
    assert gallery.renewed(text, gallery.load_results()) == text  # twice is once


def test_a_lab_that_fails_without_earlier_rows_or_only_after_holm(two_labs, tmp_path):
    row = {"mean": 0.2, "half": 0.15, "p": 0.02}
    two_labs("two", "replication.json", seen=True, p=0.02, effects={"label": row})
    (tmp_path / "results/one/verdict.json").unlink()
    text = gallery.renewed(PAGE_OF_TWO, gallery.load_results())
    assert "\n\n**Not seen:** old label | second part +0.40 ± 0.50.\n\n" in text
    assert "on 3 seeds, 2000 to 2002, but not after Holm's correction (Holm's p 0.04)." in text
    assert "1 of 2 labs see their effect, and 0 still do" in text


def test_picture_of_the_replication_stands_in_for_that_of_the_exploratory_run(two_labs, tmp_path):
    for file in ("figure.png", "replication.png"):
        (tmp_path / "results/one" / file).touch()
        assert f"![Is it so?](results/one/{file})" in gallery.renewed(PAGE_OF_TWO, gallery.load_results())


@pytest.mark.parametrize("old, new, message", [
    ("<!-- labs two --><!-- end -->", "", "no section of two"),
    ("<!-- labs two -->", "<!-- labs three -->", "no section of two"),
    ("Text stays.", "## Three\n\n<!-- labs three --><!-- end -->", "no such lab"),
    ("Text stays.", "<!-- labs three --><!-- end -->", "does not follow a title"),
])  # fmt: skip
def test_page_and_labs_that_do_not_fit_are_named(two_labs, old, new, message):
    with pytest.raises(UserError, match=message):
        gallery.renewed(PAGE_OF_TWO.replace(old, new), gallery.load_results())


def test_terminal_has_the_table_in_80_columns(two_labs, capsys):
    assert gallery.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert lines[1].split() == "one seen not seen not seen 0.04 +0.40 ± 0.50 6.0".split()
    assert lines[2].split() == "two – seen seen <0.0001 +2.00 ± 1.00 6.0".split()
    assert "one: Is it so?" in lines and "    effect: old label | second part" in lines


def test_forest_has_every_effect_in_a_scale_of_its_own(two_labs, tmp_path, monkeypatch):
    """Of +2.00 ± 2.48 and +0.40 ± 0.50 the farthest end is at 4.48; alone +2 ± 1 goes from 1/3 to 1."""
    pytest.importorskip("matplotlib")
    drawn = []
    real = gallery.draw_interval

    def noted(ax, y, row, scale, **style):
        drawn.append((round(y), style["color"], row["mean"] / scale, row["half"] / scale))
        return real(ax, y, row, scale, **style)

    monkeypatch.setattr(gallery, "draw_interval", noted)
    gallery.draw_forest(gallery.load_results(), ["two", "one"], tmp_path / "forest.png")
    half = 4.303 / math.sqrt(3)
    far = 2 + half
    assert [place[:2] for place in drawn] == [
        (0, gallery.BLUE), (1, gallery.ORANGE), (1, gallery.BLUE), (2, gallery.BLUE),
    ]  # fmt: skip
    want = [(2 / 3, 1 / 3), (2 / far, half / far), (0.4 / far, 0.5 / far), (123 / 184, 61 / 184)]
    for place, (mean, width) in zip(drawn, want, strict=True):
        assert place[2:] == pytest.approx((mean, width), rel=1e-3)


# ------------------------------------------------------------------------------------------------------------
# the committed page


def test_committed_page_is_renewed(committed):
    assert gallery.renewed(PAGE, committed) == PAGE, "run `python -m labs gallery`"


def test_committed_forest_plot_shows_the_committed_results(committed):
    picture = (HERE / "results/forest.png").read_bytes()
    assert len(picture) <= 120_000
    order = [name for _, name in gallery.SECTION.findall(PAGE)]
    assert gallery.content_of(committed, order).encode() in picture, "run `python -m labs gallery`"


def numbers(text):
    return [float(x.replace("−", "-")) for x in re.findall(NUMBER, text)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_row_of_the_summary_equals_the_json(name):
    cells = next(line for line in PAGE.splitlines() if line.startswith(f"| [{name}](#"))
    cells = [cell.strip() for cell in cells.strip("|").split(" | ")]
    last = published(name, "replication.json" if name in REPLICATED else "verdict.json")
    assert numbers(cells[5]) == [round(last["cpu_minutes"], 1), last["seeds"]]
    if (HERE / f"results/{name}/verdict.json").exists():
        assert cells[2].startswith("seen" if published(name, "verdict.json")["seen"] else "not seen")
    if name in REPLICATED:
        effect = last["effects"][cells[1].replace("\\|", "|")]
        assert effect["p"] == last["p"]
        assert cells[3].startswith("seen" if last["seen"] else "not seen")
        assert numbers(cells[3]) == pytest.approx([effect["mean"], effect["half"]], abs=0.0051)
        assert numbers(cells[4])[0] >= 0.99 * last["p"]
    else:
        assert cells[3] == cells[4] == "–"


@pytest.mark.parametrize("name", REPLICATED)
def test_what_failed_to_replicate_is_said_at_the_top_of_its_section(name):
    found = published(name, "replication.json")
    first = PAGE.split(f"<!-- labs {name} -->\n\n")[1].split("\n\n")[0]
    assert first.startswith(("**Did not replicate:** ", "**Not seen:** ")) != found["seen"]
    for label, row in found["effects"].items():
        named = re.search(re.escape(label) + " [+−]", first) is not None
        assert named == (not row["mean"] - row["half"] > 0)


def said_in(name):
    """Absolute values of all numbers in the verdicts of a lab, and in what was changed after a run."""
    found = []
    for file in ("verdict.json", "replication.json"):
        if (HERE / "results" / name / file).exists():
            verdict = published(name, file)
            found += verdict["numbers"].values()
            found += numbers(verdict["verdict"] + " ".join(verdict["changes"]))
            for row in verdict.get("effects", {}).values():
                found += [row["mean"], row["half"]]
    return [abs(x) for x in found]


@pytest.mark.parametrize("name", PUBLISHED)
def test_intervals_in_the_text_are_those_of_the_verdicts(name):
    """All but a paragraph on "An earlier set-up" or version, whose results are in the history alone."""
    text = PAGE.split(f"<!-- labs {name} -->")[1].split("<!-- end -->")[1].split("\n## ")[0]
    text = "\n".join(part for part in text.split("\n\n") if not part.startswith("An earlier "))
    known = said_in(name)
    for interval in re.findall(rf"{NUMBER}\s±\s{NUMBER}", text):
        for number in re.findall(NUMBER, interval):
            digits = len(number.partition(".")[2])
            value = abs(float(number.replace("−", "-")))
            assert any(round(x, digits) == value for x in known), f"{name}: {interval} is in no verdict"
