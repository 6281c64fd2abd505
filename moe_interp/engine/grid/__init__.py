"""Branches as a grid: a GPU's way to run them."""
