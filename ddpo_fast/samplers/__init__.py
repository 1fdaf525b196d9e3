"""One sampler a file: how much of a step goes towards the noise, and how much noise a step draws anew.

A file holds `noise(levels, eta) -> (h, s)`, two (S,) tensors. The step from x_t = a x0 + b e to the level (a', b') is then
x' = a' x0 + h e + s z with z ~ N(0, I); h^2 + s^2 = b'^2 keeps the level's variance. A step with s = 0 has no density. A file also has
`takes(eta)`, whether sample.eta may have a value; `VALID_ETA`, the same in words; `STOCHASTIC`, whether steps draw noise (s > 0); and
`PROCESS`, which levels its formula is for: "diffusion" where it needs a^2 + b^2 = 1, "flow" where it needs a + b = 1, or "any". A policy
gradient needs a stochastic sampler. No file imports torch, so that a wrong option is refused at once.
"""

import importlib
import pkgutil
from types import ModuleType

CHOICES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
"""The names of the samplers."""


def find(name: str) -> ModuleType:
    """The sampler of a name, one of `CHOICES`."""
    return importlib.import_module(f"{__name__}.{name}")
