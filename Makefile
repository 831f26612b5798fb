# Each target is one line of real commands; `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
B2W := https://raw.githubusercontent.com/americanas-tech/b2w-reviews01/4639429ec698d7821fc99a0bc665fa213d9fcd5a/B2W-Reviews01.csv
BERTIMBAU := neuralmind/bert-base-portuguese-cased
BERTIMBAU_REVISION := 94d69c95f98f7d5b2a8700c420230ae10def0baa

.PHONY: help repro serve test lint b2w tune bench
help:  ## list the targets
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | column -t -s "$$(printf '\t')"

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv && pip install --quiet -r requirements.txt && touch $@

.venv/dev-installed: .venv/installed requirements-dev.txt
	pip install --quiet -r requirements-dev.txt && touch $@

repro: .venv/installed  ## install into .venv and run the pipeline, from download to promote and report
	dvc repro

serve: .venv/installed  ## answer HTTP requests on port 8000 with the model in production
	gunicorn -c serve/gunicorn.conf.py serve.app:app

test: .venv/dev-installed  ## run the tests, in up to six processes, a file at a time in each
	python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: .venv/dev-installed  ## run the linters
	ruff check . && ruff format --check . && mypy

b2w: .venv/installed  ## the whole B2W corpus with BERTimbau, as an experiment; a GPU if there is one
	dvc exp run -S download.source=$(B2W) -S download.licence=CC-BY-NC-SA-4.0 -S model.checkpoint=$(BERTIMBAU) -S model.revision=$(BERTIMBAU_REVISION) -S train.lr=3e-5 -S train.layer_decay=1.0 -S train.epochs=3 -S train.batch_tokens=4096 -S train.checkpoint_every=1000 -S train.log_every=100

tune: .venv/installed  ## search for parameters: each trial an experiment, scored on validation; goes on where it was stopped
	python -m sentiment.tune

bench: .venv/installed  ## TF-IDF with logistic regression on the prepared reviews, the baseline to beat
	python -m bench.baseline
