"""What the pages say about the code and the runs is checked against both. Three kinds of links carry a claim:

    [`train_ppo.py:129`](../train_ppo.py#L129 "shape_rewards")        line 129 holds the text in quotes
    [`train_ppo.py:278`](../train_ppo.py#L278 "detail 24")            … in a comment: the mark of a detail
    [1.39](../bench/results/demo.csv "median gold_ppo")               a figure, rounded as it is written
    [−2.6](../bench/results/demo.csv "min gold_ppo_nokl - gold_ppo")  of a difference, row by row
    [88%](../bench/results/demo.csv "median rm_acc")                  the same × 100

A figure's statistic is first, last, min, max, median or mean; rows where a column is empty do not count.

    python tests/test_docs.py --update      write line numbers and figures anew from what stands in quotes
"""

import csv
import importlib
import io
import re
import shlex
import statistics
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # --update runs this file as a script

from nanorlhf.run.cli import parse  # noqa: E402

PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if p.exists()]
PAGES += sorted((ROOT / "course").glob("**/*.md"))
TRAINERS = sorted(p.stem for p in ROOT.glob("train_*.py"))
ANCHOR = re.compile(
    r'\[`(?P<name>[\w./-]+):(?P<shown>\d+)`\]\((?P<path>[^)#\s]+)#L(?P<line>\d+) "(?P<text>[^"]+)"\)'
)
FIGURE = re.compile(r'\[(?P<shown>[^\]]*)\]\((?P<path>[^)\s]+\.csv) "(?P<what>[^"]+)"\)')
DETAIL = re.compile(r"detail (\d+(?:\.\d+)?)")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def read(path):
    return path.read_text(encoding="utf-8")


def prose(page):
    """The page without its fenced blocks and inline code that holds no link: what GitHub renders as links."""
    return re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S)


def blocks(page):
    return re.findall(r"^```\w*\n(.*?)^```", read(page), flags=re.M | re.S)


def anchors(page):
    """→ (file, line number, text it must hold, match)."""
    for m in ANCHOR.finditer(read(page)):
        yield (page.parent / m["path"]).resolve(), int(m["line"]), m["text"], m


def statistic(path, what):
    """The value of `median gold_ppo` or `min gold_ppo - gold_sft` over the rows of a CSV."""
    m = re.fullmatch(r"(first|last|min|max|median|mean) (\S+)(?: - (\S+))?", what)
    if m is None:
        raise ValueError(f"{what!r} is not 'STATISTIC column' or 'STATISTIC column - column'")
    names = [name for name in m.groups()[1:] if name]
    with open(path, newline="") as f:
        cells = [[r[name] for name in names] for r in csv.DictReader(f)]
    values = [float(a) - sum(map(float, b)) for a, *b in cells if a and all(b)]
    pick = {"first": lambda v: v[0], "last": lambda v: v[-1], "min": min, "max": max,
            "median": statistics.median, "mean": statistics.mean}  # fmt: skip
    return pick[m[1]](values)


def written_like(shown, value):
    """`value` with the decimals, the percent sign, the plus sign and the thousands' comma of `shown`."""
    pattern = r"[`*]*(?P<sign>[+−-]?)\d[\d,]*(?:\.(?P<decimals>\d+))?(?P<percent> ?%)?[`*]*"
    number = re.fullmatch(pattern, shown)
    if number is None:
        raise ValueError(f"{shown!r} is not one number")
    percent, digits = number["percent"] or "", len(number["decimals"] or "")
    comma = "," if "," in shown else ""
    body = f"{abs(value) * (100 if percent else 1):{comma}.{digits}f}"
    zero = not re.search("[1-9]", body)
    sign = "" if zero else "−" if value < 0 else "+" if number["sign"] == "+" else ""
    return re.sub(r"[+−-]?\d[\d,]*(?:\.\d+)?(?: ?%)?", lambda _: sign + body + percent, shown, count=1)


def code_marks():
    """(file, line, detail number) of every `detail N` in a comment of trainers, demo and package."""
    found = set()
    for path in (*ROOT.glob("train_*.py"), ROOT / "demo.py", *ROOT.glob("nanorlhf/**/*.py")):
        for token in tokenize.generate_tokens(io.StringIO(read(path)).readline):
            if token.type == tokenize.COMMENT:
                found |= {(path, token.start[0], n) for n in DETAIL.findall(token.string)}
    return found


# ------------------------------------------------------------------------------------------------------------
# tests


@each_page
def test_every_anchor_points_to_the_line_that_holds_its_text(page):
    """File exists, the number shown is the number linked, the name shown is the file, and the line has it."""
    wrong = []
    for path, line, text, m in anchors(page):
        lines = read(path).split("\n") if path.is_file() else []
        same = int(m["shown"]) == line and path == ROOT / m["name"] and line <= len(lines)
        if not same or text not in lines[line - 1]:
            wrong.append(m[0])
    assert not wrong, f"{page.name}: run python tests/test_docs.py --update, or mend the text of {wrong}"


@each_page
def test_every_link_to_a_line_is_an_anchor_this_file_checks(page):
    """No link with #L escapes the convention, so no line number can rot unseen."""
    assert len(re.findall(r"#L\d+", read(page))) == len(list(anchors(page)))


@each_page
def test_every_figure_is_what_its_csv_says(page):
    for m in FIGURE.finditer(read(page)):
        path = (page.parent / m["path"]).resolve()
        assert path.is_file(), f"{m[0]}: no such file"
        assert m["shown"] == written_like(m["shown"], statistic(path, m["what"])), m[0]


@each_page
def test_every_relative_link_resolves(page):
    """Links and pictures to files of the repository, headings included (GitHub's rule for their names)."""
    for target in re.findall(r'\]\(([^)\s]+)(?: "[^"]*")?\)|src="([^"]+)"', prose(page)):
        target = "".join(target)
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        path = (page.parent / path).resolve() if path else page
        assert path.exists(), f"{page.name}: {target} does not exist"
        if heading and path.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", read(path), flags=re.M)
            slugs = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
            assert heading in slugs, f"{page.name}: {target} has no such heading"


@each_page
def test_every_command_parses(page):
    """Flags of trainers and demo exist and are well-typed; every other script that is run is there."""
    for line in "\n".join(blocks(page)).replace("\\\n", " ").split("\n"):
        m = re.match(r"\s*(?:\$ )?(?:\S*bin/)?python3? ([\w./-]+\.py)(.*)", line)
        if m is None:
            continue
        script = ROOT / m[1]
        assert script.is_file(), f"{page.name}: {line}"
        if m[1] in (*(f"{t}.py" for t in TRAINERS), "demo.py"):
            argv = shlex.split(m[2].split("&&")[0], comments=True)
            if "--help" not in argv:
                parse(importlib.import_module(script.stem).Config, argv)  # raises on what is wrong


@each_page
def test_every_example_prints_what_the_page_says(page, capsys):
    """A python block right before a text block is run and prints it. A page's blocks share their names."""
    names = {}
    pattern = r"^```python\n(.*?)^```\n```text\n(.*?)^```"
    for code, output in re.findall(pattern, read(page), flags=re.M | re.S):
        exec(code, names)
        assert capsys.readouterr().out == output


def test_details_and_the_marks_in_the_code_are_the_same():
    """docs/details.md links every `detail N` comment of the code from the row of N, and links no other."""
    page, linked = ROOT / "docs/details.md", set()
    for row in re.findall(r"^\|.*$", read(page), flags=re.M):
        number = re.match(r"\| *(\d+(?:\.\d+)?) *\|", row)
        for m in ANCHOR.finditer(row):
            for n in DETAIL.findall(m["text"]):
                assert number and n == number[1], f"a link to detail {n} in the row {row[:40]}"
                linked.add((ROOT / m["name"], int(m["line"]), n))
    both = linked, code_marks()
    linked, marked = (sorted(f"{p.name}:{line} detail {n}" for p, line, n in marks) for marks in both)
    assert linked == marked


def test_details_lists_all_25_and_where_each_that_applies_is():
    """One row for each number, in order; a row that says `yes` links at least one marked line."""
    page = read(ROOT / "docs/details.md")
    rows = re.findall(r"^\| *(\d+)(\.\d+)? *\|([^|]*)\|([^|]*)\|(.*)$", page, flags=re.M)
    assert list(dict.fromkeys(int(n) for n, *_ in rows)) == list(range(1, 26))
    for n, part, _, applies, rest in rows:
        assert applies.strip() in ("yes", "no", "other"), f"detail {n}{part}: {applies}"
        assert (applies.strip() == "yes") <= (f'"detail {n}{part}"' in rest), f"detail {n}{part} has no line"


def test_notation_names_every_column_of_every_trainer():
    """The table under "Metrics" in docs/00-notation.md has exactly the columns that the trainers write."""
    section = read(ROOT / "docs/00-notation.md").split("\n## Metrics", 1)[1].split("\n## ", 1)[0]
    first_cells = re.findall(r"^\| *(`[^|]*)\|", section, flags=re.M)
    named = [name for cell in first_cells for name in re.findall("`(.*?)`", cell)]
    columns = {c for t in TRAINERS for c in getattr(importlib.import_module(t), "COLUMNS", ())}
    assert len(named) == len(set(named)) and set(named) == columns


@pytest.mark.parametrize("shown, value, want", [
    ("1.39", 1.3855, "1.39"), ("−0.8", -2.649, "−2.6"), ("1.0", -0.04, "0.0"), ("88%", 0.8333, "83%"),
    ("+1.5", 2.17, "+2.2"), ("**195.6**", 72.395, "**72.4**"), ("1,024", 12345.6, "12,346"),
    ("1024", 12345.6, "12346"),
])  # fmt: skip
def test_figures_keep_their_format(shown, value, want):
    assert written_like(shown, value) == want


# ------------------------------------------------------------------------------------------------------------
# --update


def update(page):
    """Line numbers from the anchors' text (the nearest line that has it), figures from the CSVs."""
    marks = code_marks()

    def anchor(m):
        path = (page.parent / m["path"]).resolve()
        lines = [i for i, line in enumerate(read(path).split("\n"), start=1) if m["text"] in line]
        if number := DETAIL.search(m["text"]):  # a mark is a comment: the docstring may say the same
            lines = [i for i in lines if (path, i, number[1]) in marks]
        if not lines:
            print(f"{page.name}: {m['name']} has no line with {m['text']!r}")
            return m[0]
        line = min(lines, key=lambda i: abs(i - int(m["line"])))
        return f'[`{m["name"]}:{line}`]({m["path"]}#L{line} "{m["text"]}")'

    def figure(m):
        shown = written_like(m["shown"], statistic((page.parent / m["path"]).resolve(), m["what"]))
        return f'[{shown}]({m["path"]} "{m["what"]}")'

    old = read(page)
    new = FIGURE.sub(figure, ANCHOR.sub(anchor, old))
    if new != old:
        page.write_text(new, encoding="utf-8")
        print(f"{page.name}: updated")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    for page in PAGES:
        update(page)
