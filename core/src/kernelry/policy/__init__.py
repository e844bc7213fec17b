"""What users prefer: rules and their conditions, scopes, environment variables, lock files, measured times.

Internal: `kernelry` and `kernelry.plugin` export what others may use. Imports `execution`
for the names of the adapters, and what is below; no kernel and no plugin.
"""
