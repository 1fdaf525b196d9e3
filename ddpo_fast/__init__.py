"""ddpo_fast: reinforcement learning of text-to-image diffusion models (DDPO, arXiv:2305.13301), fast."""

import logging

# What packages say when they are imported, about what a run may never use. Who asks for it is told so: attention_backends.fault.
for _name in (
    "bitsandbytes.backends.cpu.ops",  # on a CPU with AVX512-BF16: a 4-bit kernel cannot be downloaded
    "xformers",  # its kernels were built for another PyTorch; diffusers imports it wherever it is installed
    "diffusers.models.attention_dispatch",  # the same for flash_attn and others
):
    logging.getLogger(_name).setLevel(logging.ERROR)
