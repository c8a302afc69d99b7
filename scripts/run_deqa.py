"""`accelerate launch scripts/run_deqa.py RECIPE.yaml`: DeQA-Score on several processes."""

import sys

from llmkd.cli import main

if __name__ == "__main__":
    sys.exit(main(["deqa", *sys.argv[1:]]))
