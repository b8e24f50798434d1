"""Prints the paper's Table 1 from real modules."""

from hyperdflash.commands import table1 as main

if __name__ == "__main__":
    main()
