"""Which plugins are installed: the hooks they implement, what they bring, and what is wrong with them.

Imports `policy` and what is below. Does not know how a kernel is chosen.
"""
