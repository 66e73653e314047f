# `make demo` and `make test` are all that a new user needs: each sets up .venv once, then does its job.
PY ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= $(if $(filter test test-slow docs,$(MAKECMDGOALS)),1,2)

.PHONY: help demo test test-slow docs figures clean
help:       ## this list
	@grep -E '^[a-z-]+: .*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12
.venv/.done: settings.ini setup.py
	if command -v uv >/dev/null; then \
	  uv venv -q --allow-existing --python $(PY) .venv && uv pip install -q --python $(BIN)/python -e '.[dev]'; \
	else $(PY) -m venv .venv && $(BIN)/pip install -q -e '.[dev]'; fi
	touch $@
demo: .venv/.done       ## train the three classifiers on free features and on digits, then write report/index.html
	export PYTHONWARNINGS=ignore; $(BIN)/ngc_train --suite demo --out runs/demo && $(BIN)/ngc_report --rows runs/demo --out report
test: .venv/.done       ## every notebook and every test but the slow ones
	$(BIN)/nbdev_test --n_workers 2 && $(BIN)/pytest -q -n 2 --dist loadfile tests
test-slow: .venv/.done  ## the slow notebook cells and tests as well (minutes)
	$(BIN)/nbdev_test --n_workers 2 --flags slow && $(BIN)/pytest -q -n 2 --dist loadfile tests --slow
docs: .venv/.done       ## build the site into _docs
	$(BIN)/python .ci/project.py docs
figures: .venv/.done    ## draw the figures of the committed rows into nbs/images
	$(BIN)/ngc_report --rows results --out report --figures report/figures
	for name in ufm-10 clusters-100 cifar10-resnet18; do cp report/figures/$$name.png nbs/images; done
clean:      ## remove what was generated, the environment included
	rm -rf .venv _proc _docs report build dist *.egg-info .pytest_cache .hypothesis
