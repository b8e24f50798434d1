"""Exports a trained drafter for an engine or for the Hub."""

from hyperdflash.commands import export as main

if __name__ == "__main__":
    main()
