"""Experiments: from an attached model and items or sequences to a labelled result."""
