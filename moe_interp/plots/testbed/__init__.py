"""Figures of the testbed."""
