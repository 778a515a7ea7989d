"""Runs of several processes for benchmarks: a recipe, faults, marks of time."""
