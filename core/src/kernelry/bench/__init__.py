"""Timing the kernels that serve a call, on this device, next to a matrix product and a copy.

Internal: the command `kernelry bench` is its front end. Imports everything but the command. `shapes` what is timed by
name · `cases` a call and its arrays · `work` what it takes at least · `truth` whether a result is right · `turns` how
it is timed · `rulers` against what · `peers` others' attention · `programs` who is timed · `run` one case ·
`results` what came out · `crossings` where one kernel becomes faster than another · `picture` the PNG.
"""
