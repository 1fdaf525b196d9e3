"""Changes to a network: LoRA, merged weights, fused blocks, attention, the split for the activation cache."""
