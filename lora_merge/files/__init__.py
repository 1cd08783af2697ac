"""LoRA files: keys, updates under canonical names, and the way back to a file that every loader reads."""
