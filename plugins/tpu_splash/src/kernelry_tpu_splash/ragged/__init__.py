"""Decode over rows of different length: our own Pallas kernel."""
