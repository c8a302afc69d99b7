#!/usr/bin/env bash
# From a fresh clone to a trained model and its report: makes .venv, installs, runs the recipe.
# Further flags go to the recipe: bash scripts/quickstart.sh --seed 1
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" ""
precision=()  # bf16 is slow on a CPU without kernels for it
if .venv/bin/python -c "import sys; from llmkd.methods.precision import slow_bf16 as s; sys.exit(not s())"
then precision=(--bf16 false)
fi
exec .venv/bin/llmkd salt recipes/salt/quickstart.yaml ${precision[@]+"${precision[@]}"} "$@"
