# `make train` and `make test` do all of their own set-up: Python 3.11 and make are enough for root on Debian;
# others are told which Debian packages to install first.
#
#   make train              install into .venv if it is stale, then train examples/tiny.yaml
#   make test               ... then lint, types and all tests but the slow ones
#   make test-all           ... and the slow ones
#   make venv LOCK=gpu      set-up alone, here for a CUDA machine
#   make train TORCH_INDEX=https://mirror.example/pytorch/cpu     torch from a mirror

PYTHON ?= $(shell command -v python3.11 || command -v python3)
LOCK ?= cpu
# PyPI's torch is the CUDA build; the CPU build is found here, or in the folder that PIP_FIND_LINKS names.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input -q install --no-deps
RUN := .venv/.installed-$(LOCK)
DEV := .venv/.installed-$(LOCK)-dev

.PHONY: train test test-all lint fonts venv clean

train: $(RUN)
	@echo "llmi: training examples/tiny.yaml"
	@.venv/bin/llmi train examples/tiny.yaml

test: lint fonts
	@echo "llmi: running all tests but the slow ones"
	@$(PY) -m pytest -m "not slow"

test-all: lint fonts
	@command -v chromium >/dev/null || { $(call debian,chromium); }
	@[ -e /usr/include/libaio.h ] || { $(call debian,libaio-dev g++); }
	@echo "llmi: running all tests"
	@$(PY) -m pytest

lint: $(DEV)
	@echo "llmi: checking style and types"
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet .
	@$(PY) -m mypy

# What charts in any language need (tools/fonts.py): found as matplotlib finds them, whoever installed them.
fonts: $(RUN)
	@$(PY) -c 'import sys; from matplotlib.font_manager import findSystemFonts; found = " ".join(findSystemFonts()); \
	  sys.exit(any(n not in found for n in ("NotoSansThai", "DroidSansFallback", "NanumGothic", "Symbola")))' \
	  || { $(call debian,fonts-noto-core fonts-droid-fallback fonts-nanum fonts-symbola); }

venv: $(RUN)

clean:
	@echo "llmi: removing .venv and caches (runs/ and models/ stay)"
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN): requirements/$(LOCK).txt pyproject.toml
	@echo "llmi: installing requirements/$(LOCK).txt into .venv (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "llmi: Python 3.11 is needed; name it with PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { $(call debian,python3.11-venv); }
	@$(PY) -c 'import pip, sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@$(PY) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || { $(call debian,libnuma1); }
ifeq ($(LOCK),cpu)
	@$(PIP) --retries 1 --timeout 60 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' requirements/cpu.txt)" \
	  || { echo "llmi: no CPU build of torch at $(TORCH_INDEX); set TORCH_INDEX (requirements/README.md)" >&2; exit 1; }
endif
	@$(PIP) -r requirements/$(LOCK).txt
	@$(PIP) --no-build-isolation -e .
	@touch $@

$(DEV): $(RUN) requirements/dev.txt
	@echo "llmi: installing requirements/dev.txt into .venv"
	@$(PIP) -r requirements/dev.txt
	@touch $@

# Installs Debian packages, or says that they are needed.
debian = { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends $(1); } >/dev/null 2>&1 \
	  || { echo "llmi: needed from the system, by the Debian name: $(1); please install" >&2; exit 1; }
