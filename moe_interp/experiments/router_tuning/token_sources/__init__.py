"""The tokens of a tuning run, and where a step gets what it asks of them: a cache of the last layer, or the model."""
