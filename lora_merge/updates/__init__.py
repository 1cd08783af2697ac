"""One update of one weight: LoRA, LoHa, LoKr, and what depends on the weight itself."""
