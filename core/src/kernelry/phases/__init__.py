"""The calls of a whole model: its training, prefill and decode, resolved together.

Internal: `kernelry` exports what others may use. Imports everything but the command and `aot`.
"""
