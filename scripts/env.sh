# Sourced by quickstart.sh and test.sh: makes .venv where it is missing or older than pyproject.toml.
# usage: source scripts/env.sh EXTRAS      e.g. "" or "[dev]"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1-}
python=${PYTHON:-python3}
"$python" - <<'PY'
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 14):
    sys.exit(f"llmkd needs Python 3.10 to 3.14, this is {sys.version.split()[0]}; set PYTHON=/path/to/python3")
PY
mark=.venv/llmkd-installed$extras
if [ ! -e "$mark" ] || [ pyproject.toml -nt "$mark" ]; then
  echo "installing llmkd$extras into .venv (once)"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  # torch first and with an upper bound: an open range fetches several GB of CUDA on a CPU machine
  .venv/bin/python -m pip install --quiet "torch>=2.9,<2.14"
  .venv/bin/python -m pip install --quiet --editable ".$extras"
  touch "$mark"
fi
