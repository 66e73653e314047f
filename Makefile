# `make demo` and `make test` are all a new user needs: each sets up .venv once, then does its job.
PY ?= python3
BIN := .venv/bin

.PHONY: help demo test test-slow docs figures clean
help:       ## this list
	@grep -E '^[a-z-]+: .*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14
.venv/.done: settings.ini setup.py
	$(PY) -m venv .venv && $(BIN)/pip install -q -e '.[dev]' && touch $@
