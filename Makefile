# Two commands: `make demo` draws pictures with the bundled model, `make test` runs every check.
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0
COUNT ?= 3000

.PHONY: demo test test-browser slow check docs fuzz test-lowest release

demo: .venv/.runtime
	$(BIN)/nar sample fashion -o out/fashion.png --gif

# Two files of tests at a time, each on one core: 5 min 18 s where one after the other took 11 min 51 s.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
	$(MAKE) test-browser

# The server's page in a real browser: Debian's chromium (340 MB), which is installed where that is possible; else the tests are skipped.
test-browser: .venv/.dev
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		{ apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium >/dev/null; } || \
		echo "chromium can't be installed here (that needs Debian and root): the page is not tested"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser -rs tests/test_page.py

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: .venv/.dev
	$(BIN)/python -m pytest -m slow

# The site of docs/, into out/site; links that lead nowhere end it.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Bad inputs to every verb and to the Python API, each in a process of its own: 25 min on one core.
fuzz: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --lines
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --seed $(SEED) --count $(COUNT)

# The lowest versions of all that the core needs, in an environment that is thrown away (7 GB: torch comes with CUDA).
# Muon needs torch 2.9, and older ones import more for a model without weights.
LOWEST := torch==2.7.0 numpy==1.26.0 pillow==11.3.0 safetensors==0.4.5 huggingface_hub==0.26.0 typer==0.15.0 \
	tqdm==4.66.0 pyyaml==6.0.1 pyarrow==17.0.0 tensorboard==2.17.0 setuptools==75.0.0 pytest==8.3.0 pytest-timeout==2.3.1
CORE := order attention model sampling fields likelihood engine one_reader training checkpoints
test-lowest:
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(PYTHON) -m venv $$folder && \
	$$folder/bin/python -m pip install --quiet --no-cache-dir $(LOWEST) && \
	PYTHONPATH=src OMP_NUM_THREADS=1 $$folder/bin/python -m pytest -p no:cacheprovider \
		-k "not muon and not changed_rates and not without_drawing" $(CORE:%=tests/test_%.py)

# Wheel and sdist in dist/, each installed into an environment without this checkout, where it samples, serves and trains.
release:
	rm -rf dist && $(PYTHON) scripts/release.py

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

.venv/.docs: .venv/.runtime
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@
