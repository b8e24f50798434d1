"""Decodes a prompt with a drafter, drafts in color."""

from hyperdflash.generation.job import main

if __name__ == "__main__":
    main()
