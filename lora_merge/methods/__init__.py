"""Merge methods: a row of the table each, made of pruning and of agreeing on signs."""
