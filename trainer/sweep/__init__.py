"""Sweeps: several trainings side by side, and what comes of comparing them."""
