"""One reward a file: what scores pictures.

The reward that a file holds has the file's name: in clip_score.py, a function `clip_score` or a class `ClipScore`. It is
(images (B, 3, H, W) fp32 in [0, 1], prompts: B strings) -> (B,) numbers, higher is better; a class is made once and called so. One that
takes `metadata` gets B JSON objects, where the prompts have them.
"""

import pkgutil
from types import ModuleType

CHOICES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
"""The names of the rewards."""


def attribute(module: ModuleType, name: str) -> str:
    """What the reward `name` is called in its file."""
    return next((found for found in vars(module) if found.lower() == name.replace("_", "")), name)
