"""MaxText's option names, read into an AttentionConfig.

`options` has the table of the options about attention, `choice` the kernels that they name, `mesh` the sharding,
`blocks` the decoder blocks and the options of whole models, and `not_attention.txt` lists the other keys of base.yml.
Source: MaxText 0.2.5, configs/base.yml and configs/types.py. Internal: `kernelry.config` exports `from_maxtext`, and
`kernelry.models` reads models.
"""

from kernelry.config.maxtext.reading import Caller, from_maxtext, merged, read_options

__all__ = ["Caller", "from_maxtext", "merged", "read_options"]
