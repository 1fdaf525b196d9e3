"""Coefficients-preserving sampling (arXiv:2509.05952): every step draws the same share of its level's noise anew. So no step leaves more
noise than its level has. A last step that ends at the picture draws none.

h = b' cos(eta pi / 2), s = b' sin(eta pi / 2).
"""

import math

PROCESS = "any"
STOCHASTIC = True
VALID_ETA = "0 < eta <= 1; at 1 all of the noise is drawn anew, at 0 none, so there is no policy gradient"


def takes(eta):
    return 0 < eta <= 1


def noise(levels, eta):
    angle = eta * math.pi / 2
    return levels.next_b * math.cos(angle), levels.next_b * math.sin(angle)
