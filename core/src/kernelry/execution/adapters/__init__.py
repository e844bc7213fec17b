"""Generic wrappers that let a kernel serve a request it would refuse.

Internal. Each adapter is one file; `base` has the protocol, and `order` lists them, which `import kernelry` does not
need.
"""
