"""ddpo_fast: reinforcement learning of text-to-image diffusion models (DDPO, arXiv:2305.13301), fast."""
