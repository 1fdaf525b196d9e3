"""Rewards, which score pictures: one reward a file.

A reward has the name of its file: in clip_score.py it is a function `clip_score` or a class `ClipScore`. The function, or an instance of
the class, which is made once, is called as (images (B, 3, H, W) fp32 in [0, 1], prompts: B strings) -> (B,) numbers, higher is better.
A reward that takes `metadata` also gets B JSON objects, if the prompts have them.
"""

import pkgutil
from types import ModuleType

CHOICES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
"""The names of the rewards."""


def attribute(module: ModuleType, name: str) -> str:
    """What the reward `name` is called in its file."""
    return next((found for found in vars(module) if found.lower() == name.replace("_", "")), name)
