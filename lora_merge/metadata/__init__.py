"""What a LoRA file says about itself: to people, to other programs, and the scales that PEFT keeps there."""
