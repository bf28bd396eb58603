"""The faults that mutants.py and bench/broken_runs.py plant are strings of the sources: each must occur."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(f"planted_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_mutants_fit_the_sources():
    """Once each, or a mutant would be another one than its name says."""
    for name, file, source, _, _ in load(ROOT / "tests/mutants.py").MUTANTS:
        assert (ROOT / file).read_text(encoding="utf-8").count(source) == 1, name


def test_broken_runs_fit_the_sources(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    page = load(ROOT / "bench/broken_runs.py")
    for fault in [*page.RIGHT, *page.FAULTS]:
        if fault.patch:
            file, source, _ = fault.patch
            assert source in (ROOT / file).read_text(encoding="utf-8"), fault
