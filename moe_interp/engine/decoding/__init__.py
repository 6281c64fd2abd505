"""Decoding with a cache, token by token."""
