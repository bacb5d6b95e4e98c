"""The paper's benchmarks: how their answers are read, and how they are scored, by us and by others."""
