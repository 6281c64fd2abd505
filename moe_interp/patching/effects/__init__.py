"""What experts do to a metric and to each other: split by cause, along paths, and restored into noised runs."""
