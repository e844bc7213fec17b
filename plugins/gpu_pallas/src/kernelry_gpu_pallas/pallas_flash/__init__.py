"""Flash attention in Pallas for Triton: our own kernel."""
