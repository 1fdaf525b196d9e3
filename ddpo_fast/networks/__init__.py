"""What is done to a network: LoRA, merged weights, fused blocks, attention, the cut for the activation cache."""
