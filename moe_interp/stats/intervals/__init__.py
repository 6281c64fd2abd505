"""Confidence intervals, how well they cover, and the words that follow from them."""
