# The two commands of the README are `make demo` and `make test`; each makes what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard asgd_fast/*.p* asgd_fast/*.h)

.PHONY: demo test cuda lint dist coverage bench clean

demo: $(VENV)/demo
	$(BIN)/python examples/digits.py $(DEMO)
	$(BIN)/python examples/digits_torch.py $(DEMO)

test: $(VENV)/test
	$(BIN)/python -m pytest $(TEST)

cuda: $(VENV)/cuda

lint: $(VENV)/test $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint asgd_fast
	$(BIN)/mypy
	$(BIN)/stubtest --mypy-config-file pyproject.toml --ignore-missing-stub \
	    $(foreach m,core dlpack launches schedule slots table,asgd_fast._$m)

# Builds the sdist, the wheel from the sdist, and uses the wheel in an environment of its own, away
# from the source tree.
dist: $(VENV)/dev
	rm -rf dist build/wheel-env
	$(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv build/wheel-env
	build/wheel-env/bin/python -m pip install --quiet dist/*.whl
	cd build/wheel-env && bin/python -m asgd_fast

# Traces the Cython lines too, in a copy of the tree that is compiled for it.
coverage: $(VENV)/test $(VENV)/dev
	rm -rf build/coverage && mkdir -p build/coverage
	cp -r asgd_fast examples tests README.md LICENSE pyproject.toml setup.py build/coverage
	rm -f build/coverage/asgd_fast/*.c build/coverage/asgd_fast/*.so
	cd build/coverage && ASGD_FAST_TRACE=1 ../../$(BIN)/python setup.py --quiet build_ext --inplace
	cd build/coverage && ../../$(BIN)/python -m coverage run -m pytest --quiet -m 'not heavy'
	cd build/coverage && ../../$(BIN)/python -m coverage report

# Bound threads: see docs/performance.md.
bench: $(VENV)/test
	OMP_PROC_BIND=true $(BIN)/python asv_benchmarks/performance.py $(BENCH)

clean:
	rm -rf build dist *.egg-info asgd_fast/*.c asgd_fast/*.so $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/test: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

# With the compiler for GPUs, by which the tests compile all kernels; no GPU is needed.
$(VENV)/cuda: $(VENV)/test
	$(BIN)/python -m pip install --quiet --editable '.[test,cuda]'
	touch $@

$(VENV)/dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[demo,dev]'
	touch $@
