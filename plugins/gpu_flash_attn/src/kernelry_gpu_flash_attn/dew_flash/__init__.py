"""FlashAttention-2 and -3 through dew-flash-attn."""
