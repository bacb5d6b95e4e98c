# make demo: the whole story on this machine. make test: the whole suite. Each makes the environment first and re-uses what is there.
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs
HEADLESS ?=

.PHONY: demo test check env browser clean

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

clean:
	rm -rf .venv build *.egg-info
