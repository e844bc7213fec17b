"""What a kernel is: its description, what it declares, why it refuses, what it returns.

Internal: `kernelry` and `kernelry.plugin` export what others may use. Imports `request` and
what is below, and no adapter; how a kernel is chosen is not decided here.
"""
