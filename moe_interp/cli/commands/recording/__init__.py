"""Commands that record what a model does."""
