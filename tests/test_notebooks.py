"""The weeks' notebooks: each is what its page says today, and runs from its own folder.

    python -m course notebook 4      writes the one of week 4 anew
"""

import json
import os
import re

import pytest

from course import checking, cli, notebook
from nanorlhf.errors import UserError

NUMBER = re.compile(r"(?<![\w.])[-−]?\d+(?:\.\d+)?")
each_week = pytest.mark.parametrize("week", checking.WEEKS)


def load(week):
    with open(f"{checking.HERE}/{checking.folder_of(week)}/notebook.ipynb", encoding="utf-8") as f:
        return json.load(f)


def text_of(output):
    lines = output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"]
    return "".join(lines)


def same_output(old, new):
    """Equal but for one unit in the last digit of a decimal number, as other machines may round it otherwise.

    Bars of a curve and spaces are left out: a bar is drawn from such a number, and a sign moves what follows.
    """
    if re.sub(r"[\s#]+", "", NUMBER.sub("0", old)) != re.sub(r"[\s#]+", "", NUMBER.sub("0", new)):
        return False
    for a, b in zip(NUMBER.findall(old), NUMBER.findall(new), strict=True):
        if a == b:
            continue
        digits = len(b.partition(".")[2])
        values = [float(x.replace("−", "-")) for x in (a, b)]
        if digits == 0 or abs(values[0] - values[1]) > 1.01 * 10**-digits:
            return False
    return True


@pytest.mark.parametrize("old, new, equal", [
    ("loss 0.51 ###", "loss 0.52 ####", True),
    ("loss 0.51", "loss 0.55", False),
    ("12 tokens", "13 tokens", False),
    ("x = -0.0", "x = 0.0", True),
    ("loss 0.51", "gain 0.51", False),
    ("0.51 0.2", "0.51", False),
])  # fmt: skip
def test_same_output(old, new, equal):
    assert same_output(old, new) == equal


@each_week
def test_notebook_is_what_its_page_gives(week):
    """Run every cell anew: sources are equal, and what they print is."""
    old = load(week)
    new = notebook.build(week)
    assert [c["source"] for c in old["cells"]] == [c["source"] for c in new["cells"]], (
        f"the page has changed: python -m course notebook {week}"
    )
    for before, after in zip(old["cells"], new["cells"]):
        where = "".join(after["source"])
        for a, b in zip(before.get("outputs", []), after.get("outputs", []), strict=True):
            assert a["output_type"] == b["output_type"], where
            texts = f"before:\n{text_of(a)}\nnow:\n{text_of(b)}"
            assert same_output(text_of(a), text_of(b)), f"{where}\n\n{texts}"
    assert {k: v for k, v in old.items() if k != "cells"} == {k: v for k, v in new.items() if k != "cells"}


@each_week
def test_notebook_is_nbformat_4(week):
    """What Jupyter asks of the file: ids that differ, lists of lines, outputs of known kinds, no errors."""
    found = load(week)
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in found["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", i) for i in ids)
    number = 0
    for cell in found["cells"]:
        kind = cell["cell_type"]
        fields = {"cell_type", "id", "metadata", "source"}
        assert kind in ("markdown", "code")
        if kind == "code":
            number += 1
            assert cell["execution_count"] == number
            fields |= {"execution_count", "outputs"}
            assert {o["output_type"] for o in cell["outputs"]} <= {"stream", "execute_result"}
        assert cell.keys() == fields
        assert all(line.endswith("\n") for line in cell["source"][:-1])


@each_week
def test_notebook_teaches(week):
    """Prose before every cell but the first, most cells print, and it ends with something to do."""
    cells = load(week)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 6
    assert sum(bool(cell["outputs"]) for cell in code) >= len(code) - 2
    assert cells[0]["source"][0].startswith(f"# Week {week} in cells")
    assert "## Your turn\n" in cells[-1]["source"]


@each_week
def test_links_of_a_notebook_lead_somewhere(week):
    """Also those of included sections, which come from another folder; and no link has a line's number."""
    folder = checking.HERE + "/" + checking.folder_of(week)
    for kind, text in notebook.cells_of(week):
        if kind == "markdown":
            assert "#L" not in text
            for target, _ in notebook.LINK.findall(text):
                path = target.partition("#")[0]
                assert re.match(r"[a-z]+:", target) or os.path.exists(f"{folder}/{path}"), target


def test_a_cell_shows_what_it_prints_and_its_last_value():
    assert notebook.execute("print(1)\nx = 2\nx + 1", {}, "cell") == ("1\n", "3")
    assert notebook.execute("x = 2", {}, "cell") == ("", None)
    assert notebook.execute("print(1)", {}, "cell") == ("1\n", None)


def test_an_error_names_the_cell():
    with pytest.raises(ZeroDivisionError) as error:
        notebook.execute("x = 1\n1 / 0", {}, "week01/notebook.md, cell 3")
    assert error.tb.tb_next.tb_next.tb_frame.f_code.co_filename == "week01/notebook.md, cell 3"


def test_a_page_becomes_cells():
    page = "# A\n\nprose\n\n```python\nx = 1\n```\n```text\nits output\n```\nmore\n\n```\nno cell\n```\n"
    assert notebook.split(page) == [
        ("markdown", "# A\n\nprose"),
        ("code", "x = 1"),
        ("markdown", "more\n\n```\nno cell\n```"),
    ]


def test_a_section_that_is_not_there():
    with pytest.raises(UserError, match="has no section 'Z'"):
        notebook.section("docs/03-policy-gradient.md", "Z")


def test_the_command_writes_the_week_and_refuses_another(tmp_path, monkeypatch, capsys):
    """Week 4 is the quickest: it trains nothing but a table."""
    monkeypatch.setattr(notebook, "path_of", lambda week: str(tmp_path / f"{week}.ipynb"))
    assert cli.main(["notebook", "4"]) == 0
    written = json.loads((tmp_path / "4.ipynb").read_text("utf-8"))
    assert written["cells"][0] == load(4)["cells"][0]
    assert cli.main(["notebook", "11"]) == 2
    assert "the course has the weeks 1 to 10" in capsys.readouterr().err
