"""What experiments are given: items and sequences, read and checked."""
