# `make test` sets itself up in .venv, `make demo` in .venv-demo; nothing else needs to be there.
#
#   make check      ruff, mypy and the unit tests
#   make unit, process, frameworks, trackers, chaos
#                   one layer of the tests
#   make test       everything, in parallel
#
# `make check PYTHON=python3.12`, or `unit` or `process`, uses a small environment of that Python,
# .venv-python3.12: without frameworks and trackers; what needs them is skipped.
PYTHON ?= python3
VENV ?= .venv
DEMO_VENV ?= .venv-demo
# Where a virtual environment has its programs.
PROGRAMS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := $(VENV)/$(PROGRAMS)
# What is never imported needn't be compiled.
PIP_INSTALL := -m pip --disable-pip-version-check install -q --no-compile -c constraints.txt
INSTALL := $(BIN)/python $(PIP_INSTALL)
DEMO_INSTALL := $(DEMO_VENV)/$(PROGRAMS)/python $(PIP_INSTALL)
# Tests wait for each other's processes now and then, so there is one worker more than cores.
WORKERS ?= $(shell expr $$(nproc 2>/dev/null || echo 2) + 1)
# Ultralytics is tested in these versions too, each in a folder of its own.
OLD_ULTRALYTICS := 8.3.0 8.3.200 8.4.90
# What Ultralytics requires, with the build of OpenCV that needs no libGL, which machines without a
# screen lack. pip can't be told to take one for the other, so Ultralytics itself comes after these.
ULTRALYTICS_NEEDS := torch opencv-python-headless matplotlib pillow polars psutil requests nvidia-ml-py
ULTRALYTICS := torchvision ultralytics ultralytics-thop ultralytics-platform
export YOLO_OFFLINE := True
# Ultralytics logs by itself into every tracker that is installed; dvclive's part of it then ends
# a training that is in no DVC repository.
export YOLO_CONFIG_DIR := $(abspath $(VENV))/yolo

.PHONY: test check lint types unit process frameworks trackers chaos all-layers
.PHONY: demo docs extras build clean

test: lint types all-layers

check: lint types unit

# Whether all that is asked for works in the small environment of a Python that is named.
LIGHT := check lint types unit process
ifeq ($(origin PYTHON),command line)
ifneq ($(MAKECMDGOALS),)
SMALL := $(if $(filter-out $(LIGHT),$(MAKECMDGOALS)),,1)
endif
endif
ifeq ($(SMALL),1)
LIGHT_VENV := .venv-$(notdir $(PYTHON))
CHECKED := trainbus tests/typing
unit process: export TRAINBUS_SMALL := 1

$(LIGHT_VENV)/ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(LIGHT_VENV)
	$(LIGHT_VENV)/$(PROGRAMS)/python $(PIP_INSTALL) -e ".[check]"
	touch $@
else
LIGHT_VENV := $(VENV)
CHECKED := trainbus adapters sinks tests examples benchmarks
endif
LIGHT_BIN := $(LIGHT_VENV)/$(PROGRAMS)
PYTEST := -m pytest -n $(WORKERS)

$(VENV)/ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(ULTRALYTICS_NEEDS)
	$(INSTALL) --no-deps $(ULTRALYTICS)
	$(INSTALL) --no-build-isolation -e ".[dev]"
	set -e; for v in $(OLD_ULTRALYTICS); do \
	  $(BIN)/python -m pip install -q --no-compile --no-deps --target $(VENV)/ultralytics/$$v ultralytics==$$v; done
	# The pages of runs are looked at in a browser, where there is one.
	command -v chromium > /dev/null || { apt-get update -q && \
	  apt-get install -yq --no-install-recommends chromium; } || true
	mkdir -p $(YOLO_CONFIG_DIR)
	$(BIN)/python tests/support/torchvision_cpu.py tests/support/quiet.py
	touch $@

$(DEMO_VENV)/ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_INSTALL) $(ULTRALYTICS_NEEDS)
	$(DEMO_INSTALL) --no-deps $(ULTRALYTICS)
	$(DEMO_INSTALL) --no-build-isolation -e ".[wandb]"
	mkdir -p $(DEMO_VENV)/yolo
	touch $@

lint: $(LIGHT_VENV)/ready
	$(LIGHT_BIN)/ruff check .
	$(LIGHT_BIN)/ruff format --check .

types: $(LIGHT_VENV)/ready
	$(LIGHT_BIN)/mypy $(CHECKED)

unit process: $(LIGHT_VENV)/ready
	$(LIGHT_BIN)/python $(PYTEST) tests/$@

frameworks trackers chaos: $(VENV)/ready
	$(BIN)/python $(PYTEST) tests/$@

all-layers: $(VENV)/ready
	$(BIN)/python $(PYTEST)

demo: export YOLO_CONFIG_DIR := $(abspath $(DEMO_VENV))/yolo
demo: $(DEMO_VENV)/ready
	$(DEMO_VENV)/$(PROGRAMS)/python tests/support/torchvision_cpu.py examples/ultralytics_wandb.py

docs: $(VENV)/ready
	$(BIN)/python tests/support/event_table.py
	$(BIN)/python tests/support/option_tables.py
	$(BIN)/python tests/support/screenshots.py

# Downloads much: each sink's extra alone, in an environment of its own.
extras: $(VENV)/ready
	$(BIN)/python tests/support/extras.py

build: $(VENV)/ready
	$(BIN)/python -m build

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
