"""The modules of benchmarks/device.py.

`clock` how long it may take · `shapes` what is timed · `calls` a call as a function · `kernels`, `peers` who is timed ·
`truth` whether they are right · `timing` how · `rulers` against what · `cells` one shape, one pass · `conformance` the
kit · `targets` the sums at the end · `report` the JSON · `picture` the PNG · `command` the order of it all.
"""
