"""Decode with the keys split among programs: our own Pallas kernel."""
