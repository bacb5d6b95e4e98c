# make demo: train, analyze and look at two models on this machine. make test: the whole test suite.
# Both install the environment into .venv first and re-use what is already there.
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs
HEADLESS ?=

.PHONY: demo test test-fast coverage check docs docs-serve env browser clean

env: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@echo "== installing the environment into .venv (7.6 GB; takes some minutes the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[test]'
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # on all cores, unlike pip; some packages hold files that are no Python
	@touch $@

# Serves the dashboard, trains two models and runs every analysis on both; finished steps are looked up, so an interrupted demo continues.
demo: env
	$(BIN)/python -m workbench.demo --runs $(RUNS) $(if $(HEADLESS),--headless)

# One thread for each of the two workers, since tests start processes of their own. A test file stays on one worker, so that its tests share their models.
test: env browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# Without the tests that train models, run long commands or drive a browser.
test-fast: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow and not browser"

# Lines that the suite does not run in the processes of the tests; those that only commands in forks run count as missed.
coverage: env browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --cov --cov-report term:skip-covered

# The browser test needs Debian's chromium. Without it the test is skipped, or fails if the variable CI is set.
browser:
	@command -v chromium >/dev/null || { echo "== installing chromium for the browser test"; apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || echo "chromium could not be installed, so the browser test will be skipped"

check: env
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# Builds the site in site/ from docs/ and the docstrings; a broken link or a page outside the navigation is an error.
docs: env .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet && echo "site/index.html"

docs-serve: env .venv/.docs
	$(BIN)/python -m mkdocs serve

.venv/.docs: .venv/.ready
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv build site *.egg-info
