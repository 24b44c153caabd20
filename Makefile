# make demo    set up, then show what spikeform does
# make test    set up, then lint, type check and test

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# torch from PyPI brings gigabytes of CUDA libraries on Linux. PyTorch's own index has the CPU build; pip
# prefers it (2.13.0+cpu counts as newer than 2.13.0) and falls back to PyPI where that index is out of reach.
# For a GPU: make TORCH_INDEX=https://pypi.org/simple
TORCH := torch==2.13.0
TORCH_INDEX := https://download.pytorch.org/whl/cpu
JOBS := 2

.PHONY: demo test lint clean

demo: $(STAMP)
	$(BIN)/spikeform demo

# One thread in each of JOBS processes: the tests' models are too small to share.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/pyrefly check

# torch first, so that what follows finds it there and takes no other build. The sources of the compiled library count
# too: one that was built from others is not used.
$(STAMP): pyproject.toml hatch_build.py $(wildcard src/spikeform/native/csrc/*)
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --retries 1 --extra-index-url $(TORCH_INDEX) $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev,eval,train,prefer]'
	touch $@

clean:
	rm -rf $(VENV) demo-out dist build .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -type d -exec rm -rf {} +
