"""Expert isolation: what each expert does alone, and whether the router prefers the good ones."""
