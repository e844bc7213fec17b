"""What a kernel is: its description, what it declares, why it refuses, what it returns.

Imports `request` and what is below. Knows neither adapters nor how a kernel is chosen.
"""
