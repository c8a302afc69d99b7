"""`accelerate launch scripts/run_irepo.py RECIPE.yaml`: iREPO on several processes."""

import sys

from llmkd.cli import main
from llmkd.launch import leave

if __name__ == "__main__":
    leave(main(["irepo", *sys.argv[1:]]))
