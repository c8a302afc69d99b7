"""`accelerate launch scripts/run_ernie_tiny.py RECIPE.yaml`: ERNIE-Tiny on several processes."""

import sys

from llmkd.cli import main
from llmkd.launch import leave

if __name__ == "__main__":
    leave(main(["ernie-tiny", *sys.argv[1:]]))
