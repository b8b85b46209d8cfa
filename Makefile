# `make demo` and `make test` need Python 3.11 or later and nothing else. Both install into .venv: the demo what a
# training run needs, the tests what they need besides. With another PYTHON, .venv is made again.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# Tests that need PyTorch are skipped where it is absent. Its CPU build: `make TORCH="torch --index-url …" test`.
TORCH ?= $(if $(filter 3.11,$(VERSION)),torch==2.13.0)
WORKDIR ?= runs/scenes
CORE := .venv/.core-$(VERSION)
TEST := .venv/.test-$(VERSION)

.PHONY: venv demo test docs clean

venv: $(CORE)

$(CORE): setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed"'
	test -e $@ || $(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet -e .
	touch $@

$(TEST): $(CORE)
	$(if $(strip $(TORCH)),.venv/bin/python -m pip install --quiet $(TORCH))
	.venv/bin/python -m pip install --quiet -e '.[test]'
	$(if $(strip $(TORCH)),.venv/bin/python -m pip install --quiet -e '.[torch-test]')
	touch $@

demo: $(CORE)
	.venv/bin/python -m flair_jax.main --config scenes --workdir $(WORKDIR)

test: $(TEST)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest -n 2 --dist worksteal

docs: $(CORE)
	.venv/bin/python -m pip install --quiet -e '.[docs]'
	.venv/bin/python -m mkdocs build --strict

clean:
	rm -rf .venv runs
