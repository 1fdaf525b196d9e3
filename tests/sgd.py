"""The trainer with plain SGD in AdamW's place, so that a change of weights is a gradient. Started by test_launch.py.

LoRA's weights start from small noise: from its own start, B = 0, half of the gradient is 0.
"""

import torch

from ddpo_fast.train import main


def sgd(parameters, lr, **_):
    torch.manual_seed(1)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.02)
    return torch.optim.SGD(parameters, lr=lr)


if __name__ == "__main__":
    torch.optim.AdamW = sgd
    main()
