"""pass@K: how often one of K sampled completions is right."""
