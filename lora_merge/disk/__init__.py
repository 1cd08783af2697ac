"""Files that may come from anybody: read with their headers checked, written whole or not at all. Knows no LoRA."""
