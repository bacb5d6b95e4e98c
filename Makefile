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

demo: $(RUNS)/baseline/training.json $(RUNS)/viral/training.json
	@echo "== every analysis of both models, on 40 images each"
	$(BIN)/python -m analyses.all --model $(RUNS)/baseline $(RUNS)/viral --limit 40 --output_dir $(RUNS) --report $(RUNS)/report.html
	@echo "== CKNNA of both models with DINOv2 and EfficientNet"
	$(BIN)/python -m analyses.cknna --model $(RUNS)/baseline $(RUNS)/viral --vfm dinov2-small efficientnet-lite0 --data shapes:val --limit 200 --output_dir $(RUNS)
ifeq ($(HEADLESS),)
	@echo "== dashboard: http://127.0.0.1:8501 (Ctrl-C stops it)"
	$(BIN)/streamlit run app.py -- --runs $(RUNS)
else
	@echo "== done; serve it with: $(BIN)/streamlit run app.py -- --runs $(RUNS)"
endif

# One first stage, then the pair side by side; an interrupted run goes on where it stopped.
$(RUNS)/baseline/training.json $(RUNS)/viral/training.json &: | env
	@echo "== training"
	$(BIN)/python -m trainer.sweep trainer/sweeps/demo.yaml --output_dir $(RUNS)

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
