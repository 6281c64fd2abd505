"""Measures of recorded routing, each of a trace or of the counts of a corpus."""
