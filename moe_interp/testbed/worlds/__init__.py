"""Generated domains: each is seeded, needs nothing but Python, and splits its examples by the hash of what they ask."""
