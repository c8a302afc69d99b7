#!/usr/bin/env bash
# All checks and all tests in the quickstart's environment plus the dev extra. Flags go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" "[dev]"
# One thread a worker: two OpenMP pools on two cores wait for each other most of the time.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
.venv/bin/ruff check llmkd tests scripts
.venv/bin/ruff format --check llmkd tests scripts
.venv/bin/pyright --pythonpath .venv/bin/python
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
