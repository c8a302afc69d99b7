"""`accelerate launch scripts/run_deqa.py RECIPE.yaml`: DeQA-Score on several processes."""

import sys

from llmkd.cli import main
from llmkd.launch import leave

if __name__ == "__main__":
    leave(main(["deqa", *sys.argv[1:]]))
