"""The probability-flow ODE: no step draws noise. A step is Euler's for flow models, and DDIM's at eta 0 (arXiv:2010.02502) for others.

Equation 12 with s = 0: h = b'.
"""

PROCESS = "any"
STOCHASTIC = False
VALID_ETA = "any number: no noise is drawn"


def takes(eta):
    return True


def noise(levels, eta):
    return levels.next_b, 0 * levels.next_b
