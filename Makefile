# make demo: the whole story on this machine. make test: the whole suite. Each makes the environment first and re-uses what is there.
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs
HEADLESS ?=

.PHONY: demo test check docs docs-serve env browser clean

env: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@echo "== environment in .venv (about 6 GB, some minutes the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

# The dashboard at once, and behind it two trainings and every analysis of both; what is done already is looked up, so an interrupted demo goes on.
demo: env
	$(BIN)/python -m workbench.demo --runs $(RUNS) $(if $(HEADLESS),--headless)

# Two workers, one thread each: most of the time goes into starting commands. The files go to a worker whole, with the models they share.
test: env browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The browser test needs Debian's chromium; without it the test skips, and fails where CI is set.
browser:
	@command -v chromium >/dev/null || { echo "== chromium, for the browser test"; apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || echo "chromium could not be installed: the browser test will be skipped"

check: env
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The site in site/, from docs/ and the docstrings; a broken link or a page outside the navigation is an error.
docs: env .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet && echo "site/index.html"

docs-serve: env .venv/.docs
	$(BIN)/python -m mkdocs serve

.venv/.docs: .venv/.ready
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv build site *.egg-info
