# Every target sets itself up: Python 3.11 to 3.13 with venv, make and a package index are all it takes.
PYTHON ?= python3
# One of cpu, gpu: what the models run on.
EXTRA ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
UV = 0.13.9
BIN = .venv/bin
# vLLM's builds for CPUs and GPUs take other versions of the same packages.
LOCK = $(if $(filter gpu,$(EXTRA)),requirements-gpu.lock,requirements.lock)
# Compiled now, as where Python may not write (PYTHONDONTWRITEBYTECODE, another user's folder) each of Ray's processes
# would compile all that it imports: half a minute for vLLM instead of ten seconds.
INSTALL = --constraint $(LOCK) --compile-bytecode --editable

.PHONY: install demo serve test browser chaos cluster bench bench-all bench-install load accuracy tokens tune-proofs commands lint lock clean

install: .venv/installed

.venv/installed: pyproject.toml $(LOCK) Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==$(UV)
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(INSTALL) '.[$(EXTRA),dev]'
	touch $@

demo: install
	$(BIN)/python -m demo.run demo-output

# At 127.0.0.1:8000, until it is interrupted.
serve: install
	$(BIN)/serve run serve.app:app yolo=demo/weights/detect.pt paligemma=demo/weights/paligemma

# Two files of tests at a time, since half of a small job is one process after the other coming up.
test: lint
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Ours and the peers on the same work, for an hour and a half in which nothing else should run on the machine;
# `make bench ARGS=--quick` takes five minutes.
bench: bench-install
	$(BIN)/python -m benchmarks.throughput --record $(ARGS)

# All other contests: videos, PaliGemma, both models, the service, and a job as it grows. Hours.
bench-all: bench
	for contest in video paligemma both servers growth; do $(BIN)/python -m benchmarks.$$contest --record $(ARGS) || exit 1; done

# The service under load: closed loops, and two minutes of twice what it can.
load: bench-install
	$(BIN)/python -m benchmarks.service --record

bench-install: install
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(INSTALL) '.[$(EXTRA),dev,bench]'

# The pages in a browser, and evaluations of every kind. Debian: apt-get install chromium-headless-shell.
browser: install
	$(BIN)/python -m pytest -m slow --timeout 900 tests/test_page.py tests/test_evaluate.py

# The long proofs: processes killed at random moments, a faulty store, large inputs.
chaos: install
	$(BIN)/python -m pytest -m slow -s --timeout 3600 tests/chaos tests/test_isolate.py tests/test_cluster.py --ignore-glob '*_nodes.py'

# A cluster of network namespaces whose machines die, are cut off and come: an hour. Root; Debian: apt-get install iproute2.
cluster: install
	$(BIN)/python -m pytest -m slow -s --timeout 1800 tests/chaos/test_*_nodes.py tests/test_autoscaling.py

# What the defaults and int8 cost: 500 scenes, against fp32 and decoded in full.
accuracy: install
	$(BIN)/python -m pytest -m slow -s --timeout 900 tests/test_yolo.py tests/test_int8.py

# PaliGemma's tokens against Hugging Face's, over 200 pairs a model: half an hour.
tokens: install
	$(BIN)/python -m pytest -m slow -s --timeout 3600 tests/test_paligemma.py

# Sweeps whose driver, trials and Ray are killed, each search, a sweep in a store; and a PaliGemma that learns a new task.
tune-proofs: install
	$(BIN)/python -m pytest -m slow -s --timeout 3600 tests/test_tune.py tests/test_tune_paligemma.py tests/test_throughput.py

# The README's longer commands, and exports of every kind: twenty minutes.
commands: install
	$(BIN)/python -m pytest -m slow -s --timeout 3600 tests/test_readme.py tests/test_export.py tests/test_convert.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

COMPILE = --quiet --universal --python-version 3.11 --no-annotate --no-header --no-emit-index-url \
	--extra gcs --extra azure --extra dev --extra bench
lock: install
	$(BIN)/uv pip compile $(COMPILE) --extra cpu pyproject.toml --output-file requirements.lock
	$(BIN)/uv pip compile $(COMPILE) --extra gpu pyproject.toml --output-file requirements-gpu.lock

clean:
	rm -rf .venv demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
