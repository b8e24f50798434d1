"""Computes what drafting and verification cost on the real target."""

from hyperdflash.commands import roofline as main

if __name__ == "__main__":
    main()
