"""The faults that mutants.py and bench/broken_runs.py plant are strings of the sources: each must occur."""

import importlib.util
import re
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
    """Once each, or a mutant would be another one than its name says; what is planted is still Python."""
    for name, file, source, replacement, _ in load(ROOT / "tests/mutants.py").MUTANTS:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert text.count(source) == 1, name
        compile(text.replace(source, replacement), name, "exec")


def test_mutants_name_tests_that_exist():
    """A killing test is file::function[case]; the function must stand in that file."""
    for name, *_, tests in load(ROOT / "tests/mutants.py").MUTANTS:
        for test in tests:
            file, function = re.match(r"(.*)::(\w+)", test).groups()
            assert f"\ndef {function}(" in (ROOT / file).read_text(encoding="utf-8"), (name, test)


def test_broken_runs_fit_the_sources(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    page = load(ROOT / "bench/broken_runs.py")
    for fault in [*page.RIGHT, *page.FAULTS]:
        if fault.patch:
            file, source, replacement = fault.patch
            text = (ROOT / file).read_text(encoding="utf-8")
            assert source in text, fault
            compile(text.replace(source, replacement), fault.name, "exec")
