"""A BERT sentence encoder: its files, the model in Flax, and the same forward pass in NumPy."""
