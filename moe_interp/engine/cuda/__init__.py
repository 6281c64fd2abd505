"""What makes passes fast on a GPU."""
