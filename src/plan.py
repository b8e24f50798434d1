"""Say what a training takes in time, disk and memory, and what does not fit."""

from __future__ import annotations

from hyperdflash.planning.job import main

if __name__ == "__main__":
    main()
