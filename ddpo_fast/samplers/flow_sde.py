"""The SDE of Flow-GRPO (arXiv:2505.05470), for flow models: steps draw most noise early, and the last ones leave some in the picture.

Equation 9, with Delta = b - b' and g^2 = eta^2 b / (1 - b): h = b' - g^2 Delta / (2 b), s = g sqrt(Delta). From pure noise, where 1 - b is
0, the step takes the 1 - b of the next level instead, as the paper's code does.
"""

import math

PROCESS = "flow"
STOCHASTIC = True
VALID_ETA = "a finite number > 0"


def takes(eta):
    return 0 < eta < math.inf


def noise(levels, eta):
    delta = levels.b - levels.next_b
    rate = eta**2 / levels.a.where(levels.a > 0, levels.next_a)
    return levels.next_b - rate * delta / 2, (rate * levels.b * delta).sqrt()
