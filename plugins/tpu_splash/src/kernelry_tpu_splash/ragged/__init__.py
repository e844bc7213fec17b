"""Decode over rows of different length: a Pallas kernel of our own."""
