"""Sums, cuts and shares of low-rank updates, in factors, never as whole weights."""
