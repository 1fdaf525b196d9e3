"""ddpo_fast: reinforcement learning of text-to-image diffusion models (DDPO, arXiv:2305.13301), fast."""

import logging
import sys
from pathlib import Path

_package = Path(__file__).resolve().parent
# Python puts the folder of a script first on sys.path, and with -m the working directory: there, this package's modules and the
# checkout's kernels/, tests/ and bench/ would hide other people's packages of these names
if sys.path and (Path(sys.path[0]).resolve() == _package or sys.argv[:1] == ["-m"] and Path(sys.path[0]).resolve() == _package.parent):
    del sys.path[0]

logging.getLogger(__name__).setLevel(logging.WARNING)  # whatever a reward does to the root logger

# What packages say when they are imported, about what a run may never use. Who asks for it is told so: attention_backends.fault.
for _name in (
    "bitsandbytes.backends.cpu.ops",  # on a CPU with AVX512-BF16: a 4-bit kernel cannot be downloaded
    "xformers",  # its kernels were built for another PyTorch; diffusers imports it wherever it is installed
    "diffusers.models.attention_dispatch",  # the same for flash_attn and others
    "transformers.utils.import_utils",  # torchvision is missing, for image processors that are not used here
):
    logging.getLogger(_name).setLevel(logging.ERROR)
