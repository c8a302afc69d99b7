#!/usr/bin/env bash
# From a fresh clone to a trained model and its report: makes .venv, installs, runs the recipe.
# Further flags go to the recipe: bash scripts/quickstart.sh --seed 1
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" ""
exec .venv/bin/llmkd salt recipes/salt/quickstart.yaml "$@"
