"""What users prefer: rules and their conditions, scopes, environment variables, lock files, measured times.

Imports `execution` for the names of the adapters, and what is below. Asks no kernel and no plugin.
"""
