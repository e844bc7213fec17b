"""What is asked: the static facts of one call, and the checks of what a user passes.

Imports `masks` and `storage`. Knows neither kernels nor policies.
"""
