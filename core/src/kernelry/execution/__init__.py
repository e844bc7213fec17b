"""Running a plan: adapters, kernels over parts of the keys, merging, and errors about derivatives.

Imports `kernel` and what is below. Decides nothing.
"""
