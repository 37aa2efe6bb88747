# Every target sets up what it needs; python3 (3.11 or later) with pip is required.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
# FAISS is packaged for GPUs or for CPUs.
EXTRA ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
RUN ?= $(HOME)/transfgu/shapes
# Put the clone on Python's path: with pip's default, Python would import the folder of runs in the home folder instead.
EDITABLE := --config-settings editable_mode=compat
# Two processes, each with whole files, so that fixtures of a file are set up once. The slowest files don't run last.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
PURE := $(TWO) -m "not ray and not processes and not s3 and not long and not s3_server and not trackers"
PROCESSES := $(TWO) -m "(processes or s3) and not ray and not long and not s3_server and not trackers"
ON_RAY := -m "ray and not long"

# Many short processes import the package; only the first one compiles it.
unexport PYTHONDONTWRITEBYTECODE

# The GPU report: its folder, and cpu instead of cuda to try it. WHEELS is a folder of wheels for hosts without a network.
OUT ?= gpu-report
DEVICE ?= cuda
WHEELS ?=
# The script axe-core, with which tests check pages. Its package goes into a folder that Python does not import from,
# because it requires browsers that are not installed, of which `pip check` would complain.
AXE := axe-playwright-python==0.1.8
NEEDED := import faiss, hypothesis, jaxtyping, optuna, pytest, ray.data, ray.train, safetensors, timm, torch, torchvision

.PHONY: demo test test-pure test-processes test-ray coverage faults gpu lint types docs site hooks setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (torch and Ray: a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA),dev]' $(EDITABLE)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/axe $(AXE)
	@touch $@

demo: setup  ## run the embedded demonstration, from scenes to report
	$(PY) jobs/train.py shapes --run $(RUN)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell

types: setup
	$(VENV)/bin/mypy

test-pure: setup  ## run the tests that start neither Ray nor other programs or servers
	$(PY) -m pytest -q $(PURE)

test-processes: setup  ## run the tests that start browsers, shells, S3 servers and other programs, without Ray
	$(PY) -m pytest -q $(PROCESSES)

test-ray: setup  ## run the tests on Ray
	$(PY) -m pytest -q $(ON_RAY)

test: lint types test-pure test-processes test-ray  ## check lint and types, and run all tests except the long ones

coverage: setup  ## measure the coverage of the same tests, including Ray's workers
	$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest -q $(PURE)
	$(PY) -m coverage run -m pytest -q $(PROCESSES)
	$(PY) -m coverage run -m pytest -q $(ON_RAY)
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report --fail-under=90

faults: setup  ## run the long tests: machines, servers and disks that fail during a run
	$(PY) -m pytest -q -m "long and not s3_server"

gpu:  ## test and time a GPU in at most twelve minutes, without a network; writes gpu.json and gpu.md to OUT
	@if $(PYTHON) -c '$(NEEDED)' 2>/dev/null; then exec $(PYTHON) jobs/gpu.py --out $(OUT) --device $(DEVICE); fi; \
	if [ -n "$(WHEELS)" ]; then \
	  $(PYTHON) -m venv --system-site-packages $(VENV) && \
	  $(PY) -m pip install --quiet --no-index --find-links $(WHEELS) -e '.[$(EXTRA),dev]' $(EDITABLE) || exit 1; \
	else $(MAKE) --no-print-directory setup || exit 1; fi; \
	exec $(PY) jobs/gpu.py --out $(OUT) --device $(DEVICE)

docs: setup  ## write the pages that are generated from the code
	$(PY) -m transfgu.cli.reference_page docs/recipe.md
	$(PY) -m transfgu.cli.error_page docs/errors.md

site: $(VENV)/.docs  ## build the documentation site in site/; broken links and references are errors
	$(VENV)/bin/mkdocs build --quiet --strict

$(VENV)/.docs: $(VENV)/.installed mkdocs.yml
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]' $(EDITABLE)
	@touch $@

hooks: setup  ## check lint, spelling and types before each commit
	$(VENV)/bin/pre-commit install

clean:
	rm -rf site $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
