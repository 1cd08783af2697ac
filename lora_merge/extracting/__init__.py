"""A LoRA out of two models."""
