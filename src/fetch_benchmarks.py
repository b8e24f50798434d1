"""Writes the prompts of the paper's benchmarks from the hub into a folder."""

import sys

from hyperdflash.cli import exit_code
from hyperdflash.data.benchmark_rows import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
