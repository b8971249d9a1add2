# `make demo` and `make test` do everything on a fresh machine.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= demo-output
# Data sets for the training benchmark; it is left out where the folder is missing.
DATA   ?= ../shared/data
# Arguments of tests/mutation/run.py, such as "optim --count 100".
MUTATION ?=

.PHONY: demo test test-all lint docs bench mutation clean

# The environment is built anew when its recipe changes. torch goes first and pinned, so that no
# other requirement can choose another build of it.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/conjopt demo --out $(OUT)

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q

test-all: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m "slow or not slow"

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.ready
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

bench: $(VENV)/.ready
	$(BIN)/python tests/benchmarks/step_time.py
	$(BIN)/python tests/benchmarks/loss_time.py
	$(BIN)/python tests/benchmarks/measuring.py
	$(BIN)/python tests/benchmarks/small_structures.py
	$(BIN)/python tests/benchmarks/structure_costs.py
	$(BIN)/python tests/benchmarks/weak_spots.py
	$(BIN)/python tests/benchmarks/regularizers.py
	if [ -d "$(DATA)" ]; then \
	  $(BIN)/python tests/benchmarks/training.py --data "$(DATA)" && \
	  $(BIN)/python tests/benchmarks/plain_sgd.py --data "$(DATA)" && \
	  $(BIN)/python tests/benchmarks/batch_size.py --data "$(DATA)" && \
	  $(BIN)/python tests/benchmarks/clean_small.py --data "$(DATA)" && \
	  $(BIN)/python tests/benchmarks/certificates.py --data "$(DATA)" && \
	  $(BIN)/python tests/benchmarks/convergence.py --data "$(DATA)" --out docs/images --cost; \
	else \
	  $(BIN)/python tests/benchmarks/clean_small.py && \
	  $(BIN)/python tests/benchmarks/certificates.py; \
	fi

$(VENV)/.mutation: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[mutation]"
	touch $@

# Goes on where it was stopped; `rm -r .mutation` begins anew.
mutation: $(VENV)/.mutation
	$(BIN)/python tests/mutation/run.py $(MUTATION)

clean:
	rm -rf $(VENV) docs/_build demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
