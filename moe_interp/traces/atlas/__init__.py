"""The atlas: all measures of recorded routing in one result."""
