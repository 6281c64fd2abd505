"""Figures of router tuning."""
