"""What serves graphics cards."""
