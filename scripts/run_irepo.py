"""`accelerate launch scripts/run_irepo.py RECIPE.yaml`: iREPO on several processes."""

import sys

from llmkd.cli import main

if __name__ == "__main__":
    sys.exit(main(["irepo", *sys.argv[1:]]))
