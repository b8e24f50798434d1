"""Counts to intervals, tables and figures. Imports no torch: numpy, matplotlib, rich and the standard library."""
