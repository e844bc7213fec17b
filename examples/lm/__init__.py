"""A small byte-level language model that asks kernelry for its attention; see train_lm.py."""
