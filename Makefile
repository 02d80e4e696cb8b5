# Two commands: `make demo` draws pictures with the bundled model, `make test` runs every check.
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0
COUNT ?= 3000

.PHONY: demo test slow check fuzz

demo: .venv/.runtime
	$(BIN)/nar sample fashion -o out/fashion.png --gif

# Two files of tests at a time, each on one core: 5 min 18 s where one after the other took 11 min 51 s.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: .venv/.dev
	$(BIN)/python -m pytest -m slow

# Bad inputs to every verb and to the Python API, each in a process of its own: 25 min on one core.
fuzz: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --seed $(SEED) --count $(COUNT)

# torch first and alone, so that no other package's range can bring a build with CUDA.
.venv/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("nar needs Python 3.11 or newer; try make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	touch $@

.venv/.runtime: .venv/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.dev: .venv/.runtime
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
