"""tokamax's splash attention."""
