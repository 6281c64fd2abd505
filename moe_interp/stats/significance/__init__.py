"""Tests of hypotheses and their correction over many of them."""
