"""A module that is given another class, and taken back."""

import copy

import pytest
import torch
from torch import nn

from ddpo_fast.networks.patch import patch, unpatch


class Doubled:
    def forward(self, x):
        return self.factor * super().forward(x)


class Negated(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


def test_patches_lie_on_each_other_and_leave_nothing_behind():
    layer, x = nn.Linear(2, 3), torch.ones(1, 2)
    plain, attributes, keys = layer(x), set(vars(layer)), list(layer.state_dict())
    patch(layer, Negated)
    patch(layer, Doubled, factor=2)
    assert torch.equal(layer(x), -2 * plain) and isinstance(layer, nn.Linear) and list(layer.state_dict()) == keys
    with pytest.raises(ValueError, match="Negated: Doubled came after Negated; undo it first"):
        unpatch(layer, Negated)
    twin = copy.deepcopy(layer)
    assert [unpatch(layer, kind) for kind in (Doubled, Negated, Negated, Doubled)] == [True, True, False, False]
    assert type(layer) is nn.Linear and set(vars(layer)) == attributes and torch.equal(layer(x), plain)
    assert torch.equal(twin(x), -2 * plain)
    unpatch(twin, Doubled)
    assert torch.equal(twin(x), -plain)
