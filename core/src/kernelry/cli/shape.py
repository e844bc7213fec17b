"""The options that give a model's shape, the same for every verb that resolves its phases."""

from __future__ import annotations

from typing import Annotated

import typer

QueryLength = Annotated[int, typer.Option("--q-len", min=1, help="T, tokens of a training sequence and of a prompt.")]
MaxLength = Annotated[int | None, typer.Option("--max-len", min=1, help="slots of the cache; default T.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="B.")]
Heads = Annotated[int, typer.Option("--heads", min=1, help="N, query heads.")]
KVHeads = Annotated[int | None, typer.Option("--kv-heads", min=1, help="K, key/value heads; default N.")]
HeadDim = Annotated[int, typer.Option("--head-dim", min=1, help="H.")]
ValueDim = Annotated[int | None, typer.Option("--value-dim", min=1, help="D; default H.")]
DType = Annotated[str, typer.Option("--dtype", help="of query, key and value.")]
TwoPart = Annotated[bool, typer.Option("--two-part", help="the cache keeps prompt and answer apart.")]
