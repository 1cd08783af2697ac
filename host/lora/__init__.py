"""LoRAs in the graph: files, LORA_MODELs, what of one fits a model, patches and reports."""
