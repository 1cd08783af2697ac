"""Sampling in the graph: schedules from a model's own table, runs, guidance."""
