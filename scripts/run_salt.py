"""`accelerate launch [--config_file C] scripts/run_salt.py RECIPE.yaml [--key value ...]`."""

import sys

from llmkd.cli import main

if __name__ == "__main__":
    sys.exit(main(["salt", *sys.argv[1:]]))
