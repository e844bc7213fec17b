"""Choosing: a question about one request, the kernels asked in order, and the explained answer.

Imports `registry`, `policy` and what is below. Runs no array.
"""
