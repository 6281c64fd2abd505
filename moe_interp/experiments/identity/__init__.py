"""What tells one model, function or tensor from another, so that a store is resumed by the run that began it."""
