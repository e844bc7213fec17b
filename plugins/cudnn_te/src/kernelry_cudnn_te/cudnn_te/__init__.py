"""transformer-engine's fused attention."""
