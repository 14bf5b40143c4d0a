# `make test` and `make demo` set themselves up in .venv; nothing else needs to be there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Ultralytics is tested in these versions too, each in a folder of its own.
OLD_ULTRALYTICS := 8.3.0 8.3.200 8.4.90
export YOLO_OFFLINE := True
# Ultralytics logs by itself into every tracker that is installed; dvclive's part of it then ends
# a training that is in no DVC repository.
export YOLO_CONFIG_DIR := $(abspath $(VENV))/yolo

.PHONY: test demo lint types unit docs extras build clean

test: lint types unit

$(VENV)/ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(PIP) install -q --no-deps -c constraints.txt torchvision
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	# cv2 needs libGL, which machines without a screen lack; the headless build does not.
	$(BIN)/python -c "import cv2" 2>/dev/null || $(PIP) install -q --force-reinstall --no-deps opencv-python-headless
	set -e; for v in $(OLD_ULTRALYTICS); do \
	  $(PIP) install -q --no-deps --target $(VENV)/ultralytics/$$v ultralytics==$$v; done
	# The pages of runs are looked at in a browser, where there is one.
	command -v chromium > /dev/null || { apt-get update -q && apt-get install -yq chromium; } || true
	mkdir -p $(YOLO_CONFIG_DIR)
	$(BIN)/python tests/support/torchvision_cpu.py tests/support/quiet.py
	touch $@

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy trainbus adapters sinks tests examples benchmarks

unit: $(VENV)/ready
	$(BIN)/python -m pytest

demo: $(VENV)/ready
	$(BIN)/python tests/support/torchvision_cpu.py examples/ultralytics_wandb.py

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
