"""LoRA files: header, tensors, keys, metadata; read with every doubt named, written whole or not at all."""
