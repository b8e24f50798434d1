"""Prints the paper's Table 1 from real modules."""

from hyperdflash.drafting.table1 import main

if __name__ == "__main__":
    main()
