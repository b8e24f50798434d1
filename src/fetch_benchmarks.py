"""Writes the prompts of the paper's benchmarks from the hub into a folder."""

import sys

from hyperdflash.data.benchmark_rows import main

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
