"""Test the tests: `python -m benchmarks.planted_faults` plants faults and runs the tests of their modules."""
