"""What a merge is told: its options, and the strength of each input at each block."""
