# make life     a real model's life, from nothing but Python 3.11 or newer; ends by naming its report
# make test     the test suite, in at most 12 minutes on two cores
# make test-all everything, the slow ones too
# make check    format, lint and types
# make bench    the ratios against named peers

PYTHON ?= python3
BIN := .venv/bin
# One process per core, each with one thread; a file's tests stay together, for what they share.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: life test test-all check bench clean

life: .venv/.installed
	$(BIN)/bildung nursery
	$(BIN)/bildung live recipes/smollm2.yaml

test: .venv/.installed-test check
	-$(BIN)/bildung nursery smollm2
	$(TEST) -m "not slow"

test-all: .venv/.installed-test check
	$(BIN)/bildung nursery
	$(TEST)

check: .venv/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy bildung

bench: .venv/.installed-test life
	$(BIN)/python -m benchmarks.taps
	$(BIN)/python benchmarks/decode.py lives/smollm2/base
	$(BIN)/python benchmarks/train.py lives/smollm2/base
	$(BIN)/python benchmarks/dpo.py lives/smollm2/base

# torch is installed first and alone: a range would bring several GB of CUDA packages to a machine without a GPU.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "bildung needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) --version`. Try: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check `grep ^torch== constraints.txt`
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . -c constraints.txt
	touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]" -c constraints.txt
	touch $@

clean:
	rm -rf .venv lives build dist *.egg-info
