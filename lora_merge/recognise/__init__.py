"""What a LoRA is: published files by hash and structure, base models by shapes."""
