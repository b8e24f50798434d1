"""Writes tables, figures and one page of a sweep's finished runs (docs/training.md)."""

import sys

from hyperdflash.evaluation.report_job import main

if __name__ == "__main__":
    sys.exit(main())
