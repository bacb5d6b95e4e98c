# make demo: the whole story on this machine. make test: the whole suite. Each makes the environment first and re-uses what is there.
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs
ONE := OMP_NUM_THREADS=1
HEADLESS ?=

.PHONY: demo test check env browser clean
.DELETE_ON_ERROR:

env: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@echo "== environment in .venv (about 6 GB, some minutes the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: $(RUNS)/baseline/training.json $(RUNS)/viral/training.json
	@echo "== CKNNA of both models with DINOv2 and EfficientNet"
	$(BIN)/python -m analyses.cknna --model $(RUNS)/baseline $(RUNS)/viral --vfm dinov2-small efficientnet-lite0 --data shapes:val --limit 200 --output_dir $(RUNS)
ifeq ($(HEADLESS),)
	@echo "== dashboard: http://127.0.0.1:8501 (Ctrl-C stops it)"
	$(BIN)/streamlit run app.py -- --runs $(RUNS)
else
	@echo "== done; serve it with: $(BIN)/streamlit run app.py -- --runs $(RUNS)"
endif

# The pair trains side by side, one thread each.
$(RUNS)/baseline/training.json $(RUNS)/viral/training.json &: .venv/.ready
	@echo "== training"
	$(BIN)/python -m trainer.sweep trainer/sweeps/demo.yaml --output_dir $(RUNS)

test: env
	$(BIN)/python -m pytest

check: env
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info
