"""Where visual tokens are in an image: grids, scores within one image, VFM patches under tokens."""
