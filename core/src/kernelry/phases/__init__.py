"""The calls of a whole model: its training, prefill and decode, resolved together.

Imports everything but the commands and `aot`.
"""
