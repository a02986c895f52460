# Two commands matter: `make train` and `make test`. Each sets up its own .venv and builds the extension.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BUILT := $(VENV)/.built
CUDA_VENV := .venv-cuda
DOCS_VENV := .venv-docs
SOURCES := setup.py pyproject.toml $(wildcard csrc/* csrc/*/*)

.DEFAULT_GOAL := help
.PHONY: help train test test-all sanitize fuzz sdist wheel test-wheel hub test-pretend-gpu dry-run-acceptance bench docs lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): requirements.txt requirements-triton.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -c "import triton" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-triton.txt
	touch $@

$(BUILT): $(READY) $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

train: $(BUILT) ## train the example against torch's AdamW (ARGS="--model cnn" ...)
	$(BIN)/python examples/train.py $(ARGS)

test: $(BUILT) ## the tests, without the slow ones (ARGS="-k clip" ...)
	$(BIN)/python -m pytest -m "not slow" -n auto $(ARGS)

test-all: $(BUILT) ## all tests, with those of real models from other libraries
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-integrations.txt
	$(BIN)/python -m pytest -n auto $(ARGS)
	$(MAKE) sanitize

sanitize: $(BUILT) ## tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	$(BIN)/python tests/sanitizers/run.py address
	$(BIN)/python tests/sanitizers/run.py thread

fuzz: $(BUILT) ## kernels, operators and loading under a coverage-guided fuzzer, for 10 minutes (needs clang)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-fuzz.txt
	$(BIN)/python tests/fuzz/run.py walk -max_total_time=400 $(ARGS)
	$(BIN)/python tests/fuzz/run.py operators -max_total_time=100 $(ARGS)
	$(BIN)/python tests/fuzz/run.py loading -max_total_time=100 $(ARGS)

sdist: $(READY) ## the source distribution that is released, in dist/
	rm -f dist/*.tar.gz
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"

hub: ## the project for Hugging Face's kernel-builder, in build/hub
	rm -rf build/hub
	$(PYTHON) hub/make.py build/hub

wheel: $(READY) ## the wheel that is released, in dist/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-wheel.txt
	$(BIN)/python wheels/build.py

test-wheel: $(BUILT) ## build it, and test it in a new environment with the torch of requirements.txt
	$(BIN)/python -m pytest tests/test_wheel.py -k "not new_environment or own" $(ARGS)

$(CUDA_VENV)/.ready: requirements.txt requirements-cuda.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	grep -v '^torch==' requirements.txt | $(CUDA_VENV)/bin/python -m pip install --quiet \
		--disable-pip-version-check -r /dev/stdin -r requirements-cuda.txt
	touch $@

test-pretend-gpu: $(CUDA_VENV)/.ready ## the CUDA path, on a GPU that is emulated (downloads several GB)
	$(CUDA_VENV)/bin/python tests/pretend_gpu/run.py python -m pytest -p pretend_gpu.plugin -m gpu -n auto $(ARGS)

dry-run-acceptance: $(CUDA_VENV)/.ready ## the acceptance run of a GPU, with few values, on the emulated one
	$(CUDA_VENV)/bin/python tests/pretend_gpu/acceptance.py

bench: $(BUILT) ## time clip + step against torch (ARGS="--quick" ...)
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

$(DOCS_VENV)/.ready: requirements-docs.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

docs: $(DOCS_VENV)/.ready ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict $(ARGS)

lint: $(BUILT) ## ruff, mypy and clang-format, through pre-commit
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files

format: $(READY) ## let ruff and clang-format rewrite the files
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.* csrc/*/*.*) $$(git ls-files 'tests/*.h' 'tests/*.cpp')

clean: ## remove what was built and installed
	rm -rf $(VENV) $(CUDA_VENV) $(DOCS_VENV) build dist site *.egg-info fused_adamw/*.so
