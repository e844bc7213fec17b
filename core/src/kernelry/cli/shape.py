"""The options that give a model's shape, the same for every verb that resolves its phases."""

from __future__ import annotations

from typing import Annotated

import typer

from kernelry.phases import ModelShape

QueryLength = Annotated[int, typer.Option("--q-len", min=1, help="T, tokens of a training sequence and of a prompt.")]
MaxLength = Annotated[int | None, typer.Option("--max-len", min=1, help="slots of the cache; default T.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="B.")]
Heads = Annotated[int, typer.Option("--heads", min=1, help="N, query heads.")]
KVHeads = Annotated[int | None, typer.Option("--kv-heads", min=1, help="K, key/value heads; default N.")]
HeadDim = Annotated[int, typer.Option("--head-dim", min=1, help="H.")]
ValueDim = Annotated[int | None, typer.Option("--value-dim", min=1, help="D; default H.")]
DType = Annotated[str, typer.Option("--dtype", help="of query, key and value.")]
TwoPart = Annotated[bool, typer.Option("--two-part", help="the cache keeps prompt and answer apart.")]


def model_shape(
    q_len: int,
    max_len: int | None,
    batch: int,
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    value_dim: int | None,
    dtype: str,
    two_part: bool,
) -> ModelShape:
    """What the options above say together."""
    return ModelShape(
        q_len=q_len,
        max_len=q_len if max_len is None else max_len,
        batch=batch,
        q_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
        two_part=two_part,
    )
