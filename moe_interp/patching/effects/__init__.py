"""Effects of experts on a metric and on later routers: split by cause, along paths, and restored in noised runs."""
