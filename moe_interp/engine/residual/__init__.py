"""The residual stream of a decoder, as the sum of what its sublayers write."""
