"""Say what drafting and verification cost on the real target, by arithmetic."""

from __future__ import annotations

from hyperdflash.planning.roofline_job import main

if __name__ == "__main__":
    main()
