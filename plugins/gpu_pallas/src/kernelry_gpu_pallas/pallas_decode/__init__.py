"""Decode with the keys split among programs: a Pallas kernel of our own."""
