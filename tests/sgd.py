"""The trainer with plain SGD in AdamW's place, so that a change of weights is a gradient. Started by test_launch.py."""

import torch

from ddpo_fast.train import main

if __name__ == "__main__":
    torch.optim.AdamW = lambda parameters, lr, **_: torch.optim.SGD(parameters, lr=lr)
    main()
