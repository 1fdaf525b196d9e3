"""The probability-flow ODE by Euler's steps: s = 0, h = b'. On a UNet that is DDIM at eta 0 (arXiv:2010.02502, eq. 12)."""

STOCHASTIC = False
VALID_ETA = "any number: no noise is drawn"


def takes(eta):
    return True


def noise(levels, eta):
    return levels.next_b, 0 * levels.next_b
