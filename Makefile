# From nothing but Python (>= 3.10) and git: `make demo` trains a robust model, `make test` runs the tests.

PYTHON ?= python3
PIP = .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench clean

demo: .venv/.stamp
	.venv/bin/robust-train recipe=pgd_at baseline=true

test: .venv/.stamp
	.venv/bin/python -m pytest -n 2

lint: .venv/.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

bench: .venv/.stamp
	.venv/bin/python benchmarks/overhead.py
	.venv/bin/python benchmarks/digits.py

clean:
	rm -rf .venv build dist runs lightning_logs .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that a CPU build from the configured index is taken as it is; torchattacks comes
# without its dependencies, which ask for torchvision and an old requests that its attacks never import.
.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("robust-train needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps torchattacks
	@touch $@
