# make demo: the embedded model with a full, a squeezed and a uniform cache.   make test: the quick tests.
PYTHON ?= python3

.PHONY: demo test lint

demo: .venv/run
	.venv/bin/python scripts/demo.py

test: .venv/dev
	.venv/bin/python -m pytest -q

lint: .venv/dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	.venv/bin/pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@
