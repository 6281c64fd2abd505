"""Routing that inference engines and other tools recorded, one file a format."""
