"""Computes what drafting and verification cost on the real target."""

from hyperdflash.planning.roofline_job import main

if __name__ == "__main__":
    main()
