"""Laptop twins: six benchmarks in their very file formats, made of the synthetic data sets; see `__main__`."""
