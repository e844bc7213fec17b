"""Choosing: a question about one request, the kernels asked in order, and the explained answer.

Internal: `kernelry` and `kernelry.plugin` export what others may use. Imports `registry`, `policy` and what is below.
Runs no array: of an adapter it asks what it would rewrite and cost.
"""
