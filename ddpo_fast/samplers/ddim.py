"""Stochastic DDIM (arXiv:2010.02502): every step draws noise, as much as sample.eta says.

Equations 12 and 16: s = eta sqrt(b'^2 / b^2 (1 - a^2 / a'^2)), h = sqrt(b'^2 - s^2).
"""

PROCESS = "diffusion"
STOCHASTIC = True
VALID_ETA = "0 < eta <= 1; at 0 DDIM is deterministic: a step has no density, so there is no policy gradient"


def takes(eta):
    return 0 < eta <= 1


def noise(levels, eta):
    variance = levels.next_b**2
    s = eta * (variance / levels.b**2 * (1 - (levels.a / levels.next_a) ** 2)).sqrt()
    return (variance - s**2).clamp(min=0).sqrt(), s
