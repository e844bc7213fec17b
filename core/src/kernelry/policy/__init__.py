"""What users prefer: rules, the shipped policy, scopes, environment variables, lock files, measured times.

Internal: `kernelry` and `kernelry.plugin` export what others may use. Imports what is below; of `execution` the names
of the adapters, when a policy forbids some. Runs no array, and asks no kernel and no plugin.
"""
