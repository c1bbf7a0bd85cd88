# The two commands of the README are `make demo` and `make test`; each makes what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard $(foreach d,. _cpu _rows _torch cuda,asgd_fast/$d/*.p[xy][xdi] asgd_fast/$d/*.pxi asgd_fast/$d/*.h))

.PHONY: demo test test-frameworks test-pythons reliability cuda gpu gpu-wheels lint docs dist wheels coverage performance
.PHONY: bench bench-smoke bench-check bench-record annotate callgrind kernel clean

demo: $(VENV)/demo
	$(BIN)/python examples/digits.py $(DEMO)
	$(BIN)/python examples/digits_torch.py $(DEMO)

test: $(VENV)/test
	$(BIN)/python -m pytest $(TEST)

# The callbacks and examples for training frameworks, in these; `make test` skips what is missing.
test-frameworks: $(VENV)/frameworks
	$(BIN)/python -m pytest tests/integrations asgd_fast/integrations $(TEST)

# On each Python that is found, or on those of PYTHONS, such as 3.10 or a path; without torch.
test-pythons:
	.ci/test-pythons $(PYTHONS)

# The campaign of docs/reliability.md: parts, --seed, --scale or --save in RELIABILITY. Needs gcc.
reliability: $(VENV)/test
	PYTHONPATH=.:tests $(BIN)/python -m reliability $(RELIABILITY)

cuda: $(VENV)/cuda

# On a machine with a GPU, with or without a network: builds, tests, measures and looks for faults in
# at most 9 minutes, into build/gpu; PYTHON has torch there. What it may lack comes from gpu-wheels.
gpu:
	$(PYTHON) .ci/gpu.py $(GPU)

gpu-wheels:
	$(PYTHON) .ci/gpu_wheels.py

lint: $(VENV)/test $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint asgd_fast
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python tests/typed.py
	PYTHONPATH=. $(BIN)/pyright --pythonpath $(BIN)/python --verifytypes asgd_fast --ignoreexternal --outputjson | $(BIN)/python -c \
	    'import json, sys; x = json.load(sys.stdin)["typeCompleteness"]["completenessScore"]; print(f"{x:.1%} of the public names have known types"); sys.exit(x < 0.95)'
	$(BIN)/stubtest --mypy-config-file pyproject.toml --ignore-missing-stub \
	    $(foreach m,_core _schedule _rows.dlpack _rows.rows _rows.overlap _torch.memory _torch.parts _torch.record _torch.gather _torch.exchange cuda.scalars cuda.launches,asgd_fast.$m)

# The site, in build/docs; its start page is index.html. asv's page, in build/docs/speed, takes the
# results and the history of a whole clone.
docs: $(VENV)/test $(VENV)/docs $(VENV)/bench
	$(BIN)/asv publish --html-dir build/docs/speed
	$(BIN)/python -m sphinx -W -q -E -c docs -d build/doctrees -t speed . build/docs

# Builds the sdist, the wheel from the sdist, and uses the wheel in an environment of its own, away
# from the source tree.
dist: $(VENV)/dev
	rm -rf dist build/wheel-env
	$(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv build/wheel-env
	build/wheel-env/bin/python -m pip install --quiet dist/*.whl
	cd build/wheel-env && bin/python -m asgd_fast

# The wheels of a release for this machine, in dist, each tried in an environment of its own; on each
# Python that is found, or on those of PYTHONS.
wheels: $(VENV)/dev
	.ci/wheels $(PYTHONS)
	WHEELS=dist .ci/test-pythons $(PYTHONS)

# Traces the Cython lines too, in a copy of the tree that is compiled for it.
coverage: $(VENV)/test $(VENV)/dev
	rm -rf build/coverage && mkdir -p build/coverage
	cp -r asgd_fast docs examples tests README.md LICENSE pyproject.toml setup.py build/coverage
	find build/coverage/asgd_fast -name "*.c" -delete -o -name "*.so" -delete
	cd build/coverage && ASGD_FAST_TRACE=1 ../../$(BIN)/python setup.py --quiet build_ext --inplace
	cd build/coverage && ../../$(BIN)/python -m coverage run -m pytest --quiet -m 'not heavy' --ignore tests/integrations
	cd build/coverage && ../../$(BIN)/python -m coverage report

# Bound threads: see docs/performance.md.
performance: $(VENV)/test
	OMP_PROC_BIND=true $(BIN)/python asv_benchmarks/performance.py $(PERFORMANCE)

# Commits, each in a build of its own: a range in BENCH, by default HEAD alone.
bench: $(VENV)/bench
	$(BIN)/asv run $(BENCH)

# Every benchmark once, on the working tree, for which it may lack nothing; the largest cases are
# left out.
bench-smoke: $(VENV)/test $(VENV)/bench
	$(BIN)/asv check -E existing:same
	ASGD_FAST_HAS_ALL=1 $(BIN)/asv run -E existing:same --quick --dry-run --show-stderr --bench '^(?!.*(0000000|161 of))'

# Fails if HEAD takes more instructions than its parent; CHECK="base head" names other commits.
bench-check: $(VENV)/bin/python
	$(BIN)/python asv_benchmarks/gate.py $(CHECK)

# What this kind of machine has no results of yet, on the commits of history.txt.
bench-record: $(VENV)/bench
	machine=$$($(BIN)/python asv_benchmarks/asv_machine.py) && \
	  cut -d' ' -f1 asv_benchmarks/history.txt | $(BIN)/asv run --skip-existing $(BENCH) \
	  --machine "$$machine" HASHFILE:-

# What Cython made of each line, as pages in build/annotate; with the directives of setup.py.
annotate: $(VENV)/dev
	mkdir -p build/annotate
	for m in $(wildcard asgd_fast/*.pyx asgd_fast/*/*.pyx); do \
	  $(BIN)/cython -3 --annotate -o build/annotate/$$(basename $$m .pyx).c $$m \
	    -X boundscheck=False,wraparound=False,cdivision=True,initializedcheck=False || exit; done

# The instructions of the engine, by function.
callgrind: $(VENV)/test
	mkdir -p build
	valgrind --tool=callgrind --callgrind-out-file=build/callgrind.out --dump-instr=yes \
	  --collect-atstart=no --toggle-collect='__pyx_pw_9asgd_fast_5_core_*update' \
	  $(BIN)/python -I asv_benchmarks/counted.py loops
	callgrind_annotate --auto=no build/callgrind.out | head -n 40

# The code of a CUDA kernel: make kernel KERNEL="ptx --param bfloat16"; sass, and report.
kernel: $(VENV)/cuda
	$(BIN)/python -m pip install --quiet nvidia-cuda-nvdisasm
	$(BIN)/python asv_benchmarks/show_kernel.py $(KERNEL)

clean:
	find asgd_fast -name "*.c" -delete -o -name "*.so" -delete
	rm -rf build dist *.egg-info $(VENV) .asv

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The package, built once for all that is installed beside it.
$(VENV)/built: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/demo: $(VENV)/built
	$(BIN)/python .ci/install.py demo
	touch $@

$(VENV)/test: $(VENV)/built
	$(BIN)/python .ci/install.py test
	touch $@

# fastai alone: its torchvision would bring another torch.
$(VENV)/frameworks: $(VENV)/test
	$(BIN)/python .ci/install.py test frameworks
	$(BIN)/python -m pip install --quiet --no-deps fastai==2.8.12
	touch $@

# With the compiler for GPUs, by which the tests compile all kernels; no GPU is needed.
$(VENV)/cuda: $(VENV)/test
	$(BIN)/python .ci/install.py test cuda
	touch $@

$(VENV)/dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python .ci/install.py demo dev
	touch $@

$(VENV)/docs: $(VENV)/bin/python pyproject.toml
	$(BIN)/python .ci/install.py docs
	touch $@

$(VENV)/bench: $(VENV)/bin/python asv_benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --requirement asv_benchmarks/requirements.txt
	touch $@
