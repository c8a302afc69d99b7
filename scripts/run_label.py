"""`accelerate launch [--config_file C] scripts/run_label.py RECIPE.yaml [--key value ...]`."""

import sys

from llmkd.cli import main

if __name__ == "__main__":
    sys.exit(main(["label", *sys.argv[1:]]))
