"""A transformer's GELU with a sigmoid is GELU by tanh to rounding, and stands where the pipeline's own arithmetic was not asked for."""

import bounds
import pytest
import torch
from shared import CPU
from torch import nn

from ddpo_fast import kernels
from ddpo_fast.assemble import find, load_policy
from ddpo_fast.config.command_line import parse
from ddpo_fast.distributed.ranks import Ranks
from ddpo_fast.networks.sigmoid_gelu import SigmoidGELU, _SigmoidGELU, use_sigmoid


def test_values_and_gradient_are_those_of_fp64():
    """In q - q s both parts are rounded, and q is 35 at x = 5; from 5.3 on s is 1 and the difference exact."""
    x = torch.linspace(-30, 30, 10_001, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    y, expected = _SigmoidGELU.apply(x), nn.functional.gelu(exact, approximate="tanh")
    (gradient,), (slope,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), exact)
    eps = torch.finfo(torch.float32).eps
    assert torch.equal(_SigmoidGELU.apply(x.detach()), y)
    assert ((y - expected).abs() <= 4 * eps * (1 + expected.abs())).all()
    assert (gradient - slope).abs().max() <= 2 * 42 * eps
    assert torch.autograd.gradcheck(_SigmoidGELU.apply, torch.linspace(-5, 5, 23, dtype=torch.float64, requires_grad=True))


def test_only_gelu_by_tanh_is_replaced():
    network = nn.Sequential(nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU())
    assert use_sigmoid(network) == 1 and [type(module) for module in network] == [nn.GELU, SigmoidGELU, nn.SiLU]


def replaced(argv: list[str]) -> tuple[int, nn.Module, torch.Tensor]:
    """How many GELUs of a run's network are replaced, the network, and its output for given rows."""
    config = parse(argv)
    _, policy = load_policy(config, find(config), Ranks(), CPU, kernels.select(config.kernels.backend, CPU))
    return (
        sum("Sigmoid" in kind.__name__ for m in policy.network.modules() for kind in type(m).mro()),
        policy.network,
        policy.example_call(2),
    )


@pytest.mark.rounding
@pytest.mark.parametrize("name", ["sd3", "flux", "qwen_image"])
def test_a_run_in_fp32_has_it_unless_the_pipeline_s_own_is_asked_for(flow_options, name):
    (count, network, output), (none, _, expected) = (
        replaced(flow_options(name, model__dtype="fp32", kernels__backend=backend)) for backend in ("auto", "reference")
    )
    assert count > none == 0
    bounds.assert_same_output(output, expected, network)


def test_half_precision_does_not_have_it(flow_options):
    assert replaced(flow_options("sd3", model__dtype="bf16"))[0] == 0
