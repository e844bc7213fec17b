"""Attention on a mesh: which sharding a call has, how its arrays are cut, and the steps in which queries meet keys.

Internal: `kernelry.parallel` exports what others may use. Imports `resolution` and what is below; nothing imports it
where no mesh is active.
"""
