"""One sampler a file: how much of a step goes towards the noise, and how much noise a step draws anew.

A file holds `noise(levels, eta) -> (h, s)`, two (S,) tensors. The step from x_t = a x0 + b e to the level (a', b') is then
x' = a' x0 + h e + s z with z ~ N(0, I); h^2 + s^2 = b'^2 keeps the level's variance. A file also holds `VALID_ETA`, what sample.eta may
be, in words, `takes(eta) -> bool`, which says the same of a number, and `STOCHASTIC`, whether any step draws noise (s > 0), which a
policy gradient needs. No file imports torch, so that a wrong option costs no time.
"""

import importlib
import pkgutil
from types import ModuleType

CHOICES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
"""The names of the samplers."""


def find(name: str) -> ModuleType:
    """The sampler of a name, one of `CHOICES`."""
    return importlib.import_module(f"{__name__}.{name}")
