"""JAX's splash attention."""
