"""JAX's attention over pages."""
