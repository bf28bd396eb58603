"""`python -m course notebook N`: the notebook of a week, written from its page of prose and Python.

    course/week04/notebook.md       the source: prose, and blocks of Python that share their names
    course/week04/notebook.ipynb    the same as cells, each with what it printed

A line <!-- include docs/03-policy-gradient.md: 3 · A baseline --> stands for that section of that page. The
blocks are run in one process, as Jupyter would, from the folder of the week. A notebook is JSON (nbformat 4),
so nothing but Python is needed to write one.
"""

import ast
import contextlib
import io
import json
import os
import re
import sys

from course.checking import HERE, folder_of
from nanorlhf.errors import require

ROOT = os.path.dirname(HERE)
# A block of Python, with the output that a page may show behind it.
PYTHON = re.compile(r"^```python\n(.*?)^```\n(?:```text\n.*?^```\n)?", re.M | re.S)
INCLUDE = re.compile(r"^<!-- include (\S+): (.+) -->\n", re.M)
LINK = re.compile(r'\]\(([^)\s]+)((?: "[^"]*")?)\)')
LINE = re.compile(r'\[`([\w./-]+):\d+`\]\(([^)#\s]+)#L\d+ "([^"]*)"\)')
FIRST_TEXT = """\
The first cell makes the code of this repository importable: it lies two folders above this notebook. Run the
cells from top to bottom, since later ones use the names of earlier ones.
"""
FIRST_CODE = """\
import sys

sys.path.insert(0, "../..")
"""


# ------------------------------------------------------------------------------------------------------------
# From the page to cells


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        return f.read()


def section(page, title):
    """A section of a page, with links that hold in the folder of a week and without numbers of lines."""
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", read(page), re.M | re.S)
    require(found, f"{page} has no section {title!r}")

    def relative(match):
        target, title = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = page if target.startswith("#") else os.path.join(os.path.dirname(page), target)
        heading = target if target.startswith("#") else ""
        return f"](../../{os.path.normpath(path)}{heading}{title})".replace(os.sep, "/")

    return LINK.sub(relative, found[0])


def split(text):
    """A page → list of (kind, text): "markdown" and "code" in the order of the page."""
    parts = []
    end = 0
    for block in PYTHON.finditer(text):
        parts.append(("markdown", text[end : block.start()]))
        parts.append(("code", block[1]))
        end = block.end()
    parts.append(("markdown", text[end:]))
    return [(kind, part.strip("\n")) for kind, part in parts if part.strip()]


def cells_of(week):
    """The cells of a week's notebook without outputs; a first one makes our modules importable."""
    page = read(f"course/{folder_of(week)}/notebook.md")
    page = INCLUDE.sub(lambda include: section(include[1], include[2]) + "\n", page)
    page = LINE.sub(r'[`\1`](\2 "\3")', page)  # a number of a line would be wrong after the next edit
    heading, rest = page.split("\n", 1)
    return [("markdown", f"{heading}\n\n{FIRST_TEXT}".strip()), ("code", FIRST_CODE.strip()), *split(rest)]


# ------------------------------------------------------------------------------------------------------------
# Running them


def execute(code, names, where):
    """Run a cell → (what it printed, the text of its last expression or None)."""
    tree = ast.parse(code, where)
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    printed = io.StringIO()
    value = None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, where, "exec"), names)
        if last is not None:
            value = eval(compile(last, where, "eval"), names)
    return printed.getvalue(), None if value is None else repr(value)


@contextlib.contextmanager
def inside(folder):
    """Work in a folder, and leave sys.path as it was."""
    before = os.getcwd()
    path = list(sys.path)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path


def lines_of(text):
    return text.splitlines(keepends=True)


def build(week):
    """Run a week's cells → the notebook as a dict. An error in a cell ends it, with the cell's number."""
    cells = []
    names = {"__name__": "__main__"}
    count = 0
    with inside(os.path.join(HERE, folder_of(week))):
        for kind, text in cells_of(week):
            cell = {"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": lines_of(text)}
            cells.append(cell)
            if kind == "markdown":
                continue
            count += 1
            printed, value = execute(text, names, f"{folder_of(week)}/notebook.md, cell {count}")
            cell["execution_count"] = count
            cell["outputs"] = []
            if printed:
                stream = {"output_type": "stream", "name": "stdout", "text": lines_of(printed)}
                cell["outputs"].append(stream)
            if value is not None:
                result = {"output_type": "execute_result", "execution_count": count, "metadata": {}}
                cell["outputs"].append(result | {"data": {"text/plain": lines_of(value)}})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def path_of(week):
    return os.path.join(HERE, folder_of(week), "notebook.ipynb")


def write(weeks):
    """Write the notebooks of these weeks → exit status."""
    for week in weeks:
        notebook = build(week)
        with open(path_of(week), "w", encoding="utf-8") as f:
            f.write(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(os.path.relpath(path_of(week)), flush=True)
    return 0
