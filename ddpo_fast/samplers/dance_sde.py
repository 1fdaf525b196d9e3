"""The SDE of DanceGRPO (arXiv:2505.07818), for flow models: all steps draw noise at the same rate, and the last ones leave some in the
picture.

Flow-GRPO's step (arXiv:2505.05470, equation 9) with a constant g = eta, and Delta = b - b': h = b' - g^2 Delta / (2 b), s = g sqrt(Delta).
"""

import math

PROCESS = "flow"
STOCHASTIC = True
VALID_ETA = "a finite number > 0"


def takes(eta):
    return 0 < eta < math.inf


def noise(levels, eta):
    delta = levels.b - levels.next_b
    return levels.next_b - eta**2 * delta / (2 * levels.b), eta * delta.sqrt()
