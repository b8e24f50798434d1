"""Decodes a prompt with a drafter, drafts in color."""

from hyperdflash.commands import generate as main

if __name__ == "__main__":
    main()
