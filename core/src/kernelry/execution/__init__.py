"""Running a plan: adapters, kernels over parts of the keys, merging, and errors about derivatives.

Internal: `kernelry` and `kernelry.plugin` export what others may use. Imports `kernel` and
what is below, and no policy.
"""
