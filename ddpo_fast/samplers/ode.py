"""The probability-flow ODE: no step draws noise. It is DDIM at eta 0 (arXiv:2010.02502).

Equation 12 with s = 0: h = b'.
"""

STOCHASTIC = False
VALID_ETA = "any number: no noise is drawn"


def takes(eta):
    return True


def noise(levels, eta):
    return levels.next_b, 0 * levels.next_b
