# Two commands for a fresh clone: `make demo` and `make test`. Each sets up .venv by itself.
# PYTHON=python3.12 picks another interpreter (3.10 to 3.13); ARGS="--seed 1" is handed on to the demo.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint mutants clean

demo: .venv/.ready
	$(BIN)/python demo.py --overwrite $(ARGS)

test: .venv/.ready lint
	$(BIN)/python -m pytest
	$(BIN)/python demo.py --smoke --overwrite --out runs/smoke
	$(BIN)/python -m labs all --smoke

lint: .venv/.ready
	$(BIN)/ruff check .

mutants: .venv/.ready
	$(BIN)/python tests/mutants.py

.venv/.ready: requirements.txt
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else f'Python 3.10 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv
	@echo "installing into .venv, a minute or two ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv runs out .pytest_cache .ruff_cache .hypothesis
