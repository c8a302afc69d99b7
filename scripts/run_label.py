"""`accelerate launch [--config_file C] scripts/run_label.py RECIPE.yaml [--key value ...]`."""

import sys

from llmkd.cli import main
from llmkd.launch import leave

if __name__ == "__main__":
    leave(main(["label", *sys.argv[1:]]))
