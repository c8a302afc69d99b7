"""`accelerate launch [--config_file C] scripts/run_salt.py RECIPE.yaml [--key value ...]`."""

import sys

from llmkd.cli import main
from llmkd.launch import leave

if __name__ == "__main__":
    leave(main(["salt", *sys.argv[1:]]))
