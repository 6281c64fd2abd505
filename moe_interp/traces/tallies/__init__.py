"""Sums over the tokens of a part of a corpus, in forms whose parts add up to the whole exactly."""
