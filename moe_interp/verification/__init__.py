"""The causal checks of every hook, on the user's own model."""
