# On a fresh machine `make demo` runs the whole method small, `make test` passes the tests, `make bench` measures every
# stage on the CPU, and `make gpu-check` checks training on a GPU. Each makes its own virtual environment first, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: demo test lint bench gpu-check clean

demo: $(STAMP)
	$(BIN)/python demo/run.py $(if $(STEPS),--steps $(STEPS))

# three processes for two cores, because tests also wait; worksteal gives each neighbouring tests, so that few fixtures
# of a file are made twice
test: $(STAMP) lint
	$(BIN)/python -m pytest -q -n 3 --dist worksteal

bench: $(STAMP)
	$(BIN)/python -m benchmarks

gpu-check: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_check

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(STAMP): requirements.txt requirements-dev.txt requirements-demo.txt constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "error: $(PYTHON) is older than 3.11; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -r requirements.txt -r requirements-dev.txt
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps -r requirements-demo.txt
	@touch $@

clean:
	rm -rf exps/demo data-demo pretrained/demo
