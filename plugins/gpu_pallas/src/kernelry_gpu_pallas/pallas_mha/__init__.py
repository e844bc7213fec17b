"""JAX's Pallas Triton attention."""
