"""What is asked: the static facts of one call, and the checks of what a user passes.

Internal: `kernelry` and `kernelry.plugin` export what others may use. Imports `masks` and
`storage`, and no kernel or policy.
"""
