"""The command line, `python -m lora_merge`."""
