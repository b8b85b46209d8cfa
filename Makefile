# `make demo` and `make test` need Python 3.11 or later and nothing else.
PYTHON ?= python3
# CPU builds of PyTorch: `make TORCH="torch --index-url …" test` installs it from elsewhere.
TORCH ?= torch==2.13.0
WORKDIR ?= runs/scenes

.PHONY: venv demo test clean

venv: .venv/.installed

.venv/.installed: setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed"'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet $(TORCH)
	.venv/bin/python -m pip install --quiet -e '.[tf,test]'
	touch $@

demo: venv
	.venv/bin/python -m flair_jax.main --config configs/scenes.py --workdir $(WORKDIR)

test: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest -n 2 --dist worksteal

clean:
	rm -rf .venv runs
