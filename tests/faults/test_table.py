"""docs/reliability.md says what the tests say, and every row has its test."""

import importlib.util
from pathlib import Path

HERE = Path(__file__).parent


def test_the_table_is_up_to_date():
    spec = importlib.util.spec_from_file_location("faults", HERE / "__main__.py")
    faults = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faults)
    page = faults.PAGE.read_text(encoding="utf-8")
    assert faults.filled(page) == page, "run python -m tests.faults --update"
    found = faults.rows()
    assert all(len(tests) == 1 for tests in found.values())
    assert set(found) == set(range(1, len(found) + 1)) and len(found) >= 64
