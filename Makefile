# Every target sets itself up: Python 3.11 to 3.13 with venv, make and a package index are all it takes.
PYTHON ?= python3
# One of cpu, gpu: what the models run on.
EXTRA ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
UV = 0.13.9
BIN = .venv/bin

.PHONY: install
install: .venv/installed

.venv/installed: pyproject.toml requirements.lock Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==$(UV)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[$(EXTRA),dev]'
	touch $@
