"""The six diagrams: as bench/diagrams.py draws them, readable, and used by a page."""

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import diagrams  # noqa: E402

each = pytest.mark.parametrize("name", diagrams.FIGURES)
SPACE = "{http://www.w3.org/2000/svg}"


@each
def test_the_file_is_what_the_script_draws(name):
    path = diagrams.IMG / f"{name}.svg"
    assert path.read_text(encoding="utf-8") == diagrams.FIGURES[name]().svg(), "run python bench/diagrams.py"


@each
def test_readable(name):
    """Well-formed, on paper of its own, letters of 12 pixels at least at GitHub's width, nothing outside."""
    svg = ET.parse(diagrams.IMG / f"{name}.svg").getroot()
    width, height = (float(svg.get(side)) for side in ("width", "height"))
    assert width <= 880 and svg.find(f"{SPACE}title").text
    paper = svg.find(f"{SPACE}rect")
    assert paper.get("fill") == "#ffffff" and paper.get("height") == svg.get("height")
    for text in svg.iter(f"{SPACE}text"):
        size = float(text.get("font-size"))
        long = 0.5 * size * len(text.text)  # a letter of Helvetica is half as wide as high, or less
        x = float(text.get("x")) - {"start": 0, "middle": long / 2, "end": long}[text.get("text-anchor")]
        assert size >= 12 and x >= 0 and x + long <= width, text.text
        assert 0 < float(text.get("y")) < height
    for box in svg.iter(f"{SPACE}rect"):
        left, top = (float(box.get(name, 0)) for name in "xy")
        assert 0 <= left and left + float(box.get("width")) <= width
        assert 0 <= top and top + float(box.get("height")) <= height


@each
def test_a_page_shows_it(name):
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    assert sum(len(re.findall(rf"!\[[^\]]+\]\(img/{name}\.svg\)", page)) for page in pages) == 1
