"""Which plugins are installed: the hooks they implement, what they bring, and what is wrong with them.

Internal: `kernelry` and `kernelry.plugin` export what others may use. Imports `policy` and
what is below; how a kernel is chosen is not decided here.
"""
