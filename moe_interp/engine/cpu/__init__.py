"""What makes passes fast on a processor."""
