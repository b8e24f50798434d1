"""Decode a prompt with a drafter, drafts in color."""

from __future__ import annotations

from hyperdflash.generation.job import main

if __name__ == "__main__":
    main()
