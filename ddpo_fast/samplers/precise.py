"""Precise (arXiv:2605.23522): the SDE of flow_sde, solved exactly over each step with the expected picture held fixed. So no step leaves
more noise than its level has. A last step that ends at the picture draws none.

rho = ((a b') / (a' b))^(eta^2 / 2), h = b' rho, s = b' sqrt(1 - rho^2). At eta = sqrt(2) it is DDIM at eta 1 (arXiv:2010.02502).
"""

import math

PROCESS = "any"
STOCHASTIC = True
VALID_ETA = "a finite number > 0"


def takes(eta):
    return 0 < eta < math.inf


def noise(levels, eta):
    rho = (levels.a * levels.next_b / (levels.next_a * levels.b)) ** (eta**2 / 2)
    return levels.next_b * rho, levels.next_b * (1 - rho**2).sqrt()
