"""`accelerate launch scripts/run_ernie_tiny.py RECIPE.yaml`: ERNIE-Tiny on several processes."""

import sys

from llmkd.cli import main

if __name__ == "__main__":
    sys.exit(main(["ernie-tiny", *sys.argv[1:]]))
