# Everything below sets itself up: python3 (3.11 or later) and pip are all that must be there.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
# FAISS comes for one kind of device or the other.
EXTRA ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
RUN ?= $(HOME)/transfgu/shapes
# The clone on Python's path: by pip's other way the folder of runs would be taken for the package in one's home.
EDITABLE := --config-settings editable_mode=compat
# Two processes, each with whole files: what a file sets up once is set up once. The longest of them are not the last.
PURE := -n 2 --dist loadfile --no-loadscope-reorder -m "not ray and not long and not s3_server and not trackers"
ON_RAY := -m "ray and not long"

# The package is imported by many short processes, and compiled for the first of them alone.
unexport PYTHONDONTWRITEBYTECODE

# The GPU report: its folder, and cpu in place of cuda to try it. WHEELS is a folder of wheels for hosts without a network.
OUT ?= gpu-report
DEVICE ?= cuda
WHEELS ?=
NEEDED := import faiss, hypothesis, jaxtyping, optuna, pytest, ray.data, ray.train, safetensors, timm, torch, torchvision

.PHONY: demo test test-pure test-ray coverage faults gpu lint types docs site hooks setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (torch and Ray: a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA),dev]' $(EDITABLE)
	@touch $@

demo: setup  ## the embedded demonstration, from scenes to report
	$(PY) jobs/train.py shapes --run $(RUN)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell

types: setup
	$(VENV)/bin/mypy

test-pure: setup  ## the part that needs no Ray
	$(PY) -m pytest -q $(PURE)

test-ray: setup  ## the part that needs Ray
	$(PY) -m pytest -q $(ON_RAY)

test: lint types test-pure test-ray  ## lint, types, and the whole suite

coverage: setup  ## the whole suite, which lines it runs, in Ray's workers too
	$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest -q $(PURE)
	$(PY) -m coverage run -m pytest -q $(ON_RAY)
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report --fail-under=90

faults: setup  ## what takes long: machines, servers and disks that fail in mid-run
	$(PY) -m pytest -q -m "long and not s3_server"

gpu:  ## what a GPU shows, in twelve minutes at most, without a network: gpu.json and gpu.md in OUT
	@if $(PYTHON) -c '$(NEEDED)' 2>/dev/null; then exec $(PYTHON) jobs/gpu.py --out $(OUT) --device $(DEVICE); fi; \
	if [ -n "$(WHEELS)" ]; then \
	  $(PYTHON) -m venv --system-site-packages $(VENV) && \
	  $(PY) -m pip install --quiet --no-index --find-links $(WHEELS) -e '.[$(EXTRA),dev]' $(EDITABLE) || exit 1; \
	else $(MAKE) --no-print-directory setup || exit 1; fi; \
	exec $(PY) jobs/gpu.py --out $(OUT) --device $(DEVICE)

docs: setup  ## the pages that are written from the code
	$(PY) -m transfgu.cli.reference_page docs/recipe.md
	$(PY) -m transfgu.cli.error_page docs/errors.md

site: $(VENV)/.docs  ## the documentation site, in site/; a broken link or reference is an error
	$(VENV)/bin/mkdocs build --quiet --strict

$(VENV)/.docs: $(VENV)/.installed mkdocs.yml
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]' $(EDITABLE)
	@touch $@

hooks: setup  ## lint and types before each commit
	$(VENV)/bin/pre-commit install

clean:
	rm -rf site $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
