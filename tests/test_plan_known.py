"""Plans of flow models that are known without a network: their configs are the published ones, and a plan goes the way of a folder's."""

from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from families import make_family
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from ddpo_fast.config.command_line import parse
from ddpo_fast.config.options import ModelConfig
from ddpo_fast.pipelines.template import Asked
from ddpo_fast.planning import counts as counting
from ddpo_fast.planning import plan as plan_module
from ddpo_fast.planning.architectures import FLOW_MODELS, assumed, planned_model
from ddpo_fast.planning.counts import Call, Computing, LiveBytes, ModelCounts
from ddpo_fast.planning.plan import make_plan, plan_text

FLUX, SD35, Z_IMAGE = "black-forest-labs/FLUX.1-dev", "stabilityai/stable-diffusion-3.5-medium", "Tongyi-MAI/Z-Image"
PUBLISHED = {  # parameters in 1e9, TFLOP of a row at 512 and at 1024 pixels
    SD35: (2.24, 2.44, 11.25),
    "stabilityai/stable-diffusion-3.5-large": (8.06, 7.98, 31.1),
    FLUX: (11.9, 21.5, 74.4),
    "black-forest-labs/FLUX.2-klein-base-4B": (3.88, 10.2, 34.8),
    "Qwen/Qwen-Image": (20.4, 16.7, 70.6),
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": (1.6, 0.84, 2.97),
    Z_IMAGE: (6.16, 13.7, 56.6),
}
"""Counted once of diffusers' classes alone, called by hand with as many text tokens as the pipelines give."""

NOTHING = ModelCounts(
    weight_bytes={}, trained_shapes=(), gathered_bytes=0, num_latents=1, embed_bytes=1, image_bytes=1, forward=Call(1, 0, 1),
    update=Call(1, 0, 1), saved_row_bytes=1, decode=Call(1, 0, 1), prefix_flop=0, kept_row_bytes=0, cached_update=Call(1, 0, 1),
)  # fmt: skip


def known(name: str, **options):
    return planned_model(ModelConfig(path=name, **options))


def count_each_kind_once(network: torch.nn.Module, live: LiveBytes) -> None:
    """Makes a block of a list answer what an equal one has answered to arguments of the same sizes, for as many operations."""
    answers = {}

    def once(block: torch.nn.Module):
        forward, kind = block.forward, (type(block), *(weight.shape for weight in block.parameters()))

        def answer(*args, **kwargs):
            key = kind, tuple(getattr(leaf, "shape", None) for leaf in tree_leaves((args, kwargs)))
            if key in answers:
                live.flop += answers[key][1]
            else:
                before = live.flop
                answers[key] = forward(*args, **kwargs), live.flop - before
            return answers[key][0]

        return answer

    for module in network.modules():
        if isinstance(module, torch.nn.ModuleList):
            for block in module:
                block.forward = once(block)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")  # DPMSolverMultistep's
@pytest.mark.parametrize("name, size", [*((name, 512) for name in PUBLISHED), (Z_IMAGE, 1024)])
def test_parameters_and_operations_are_the_published_models(name, size):
    parameters, *tflops = PUBLISHED[name]
    whole = SimpleNamespace(scope="none", targets=[], rank=1, alpha=1.0)
    networks = counting._Transformer(known(name), Asked(2, 4.0, size, size), "a lion", torch.bfloat16, whole, Computing())
    assert sum(p.numel() for p in networks.network.parameters()) == pytest.approx(parameters * 1e9, rel=0.01)
    with FakeTensorMode(allow_non_fake_inputs=True):
        networks.fake()
        with torch.no_grad(), LiveBytes() as live:
            count_each_kind_once(networks.network, live)
            networks.forward(1)
    assert live.flop == pytest.approx(tflops[size == 1024] * 1e12, rel=0.02)


def test_all_that_are_known_are_held_here():
    assert FLOW_MODELS.keys() == PUBLISHED.keys()


def test_a_plan_says_what_it_has_not_read_and_asks_no_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(plan_module, "count_run", lambda *args: NOTHING)
    options = ["--sample.sampler=cps", "--sample.guidance_scale=4", "--plan=H100"]
    plan = make_plan(parse([f"--model.path={Z_IMAGE}", *options]))
    line = "Z-Image: its configs are known here; its tokenizers are not, so every text has max_sequence_length=128 tokens"
    assert plan.work.rows == 2 and line in plan_text(plan)
    for length in (64, 96):
        model = known(Z_IMAGE, arguments={"max_sequence_length": length})
        assert (length, 2560) in shapes(model.record(Asked(2, 4.0, 64, 64)).template.leaves)


def shapes(leaves: list) -> set[tuple]:
    return {tuple(leaf.shape) for leaf in tree_leaves(leaves) if isinstance(leaf, torch.Tensor)}


def test_parts_that_a_user_goes_without():
    model = known(SD35, parts={"text_encoder_3": None, "tokenizer_3": None})
    assert "text_encoder_3" not in model.classes and (4, 333, 4096) in shapes(model.record(Asked(2, 4.0, 64, 64)).template.leaves)


def test_a_folder_comes_before_what_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ModelConfig(path=FLUX)
    assert planned_model(options).configs["transformer"]["guidance_embeds"] and assumed(options, planned_model(options))
    make_family("flux", tmp_path / FLUX)
    assert planned_model(options).configs["transformer"]["num_layers"] == 2 and not assumed(options, planned_model(options))
