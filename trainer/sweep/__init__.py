"""Sweeps: several trainings and their comparison."""
