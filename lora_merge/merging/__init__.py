"""Merging whole LoRAs: plan, compute, outcome; the report, and the recipe by which a file is made again."""
