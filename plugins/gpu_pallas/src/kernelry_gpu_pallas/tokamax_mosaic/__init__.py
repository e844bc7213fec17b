"""tokamax's Mosaic GPU attention for Hopper and Blackwell."""
