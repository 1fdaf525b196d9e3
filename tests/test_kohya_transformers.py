"""A flow transformer's LoRA in kohya's format: read by diffusers' own converters, it changes every layer's weight as the run's does."""

import json
import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpo_fast.networks.initial_lora import start_from
from ddpo_fast.networks.lora import lora_layers, set_trainable
from ddpo_fast.places import LORA_FILE
from ddpo_fast.records import kohya

RANK, ALPHA = 2, 3.0
KINDS = ["attention", "feed_forward", "modulation"]


def written(folder: Path, network: nn.Module, targets: list[str], **said) -> dict[str, tuple[Tensor, Tensor]]:
    """Writes a random LoRA as a run does. Returns each layer's down and up, fp64."""
    torch.manual_seed(0)
    layers = {}
    for name in lora_layers(network, "all", targets):
        rows, columns = network.get_submodule(name).weight.shape
        layers[name] = torch.randn(RANK, columns), torch.randn(rows, RANK)
    halves = {f"transformer.{name}.lora_{half}.weight": t for name, pair in layers.items() for half, t in zip("AB", pair)}
    adapter = {"r": RANK, "lora_alpha": ALPHA, "auto_mapping": {"base_model_class": type(network).__name__}} | said
    (folder / "lora").mkdir(parents=True)
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in adapter.items()})}
    save_file(halves, folder / "lora" / LORA_FILE, metadata)
    return {name: tuple(half.double() for half in pair) for name, pair in layers.items()}


def assert_same(found: Tensor, expected: Tensor) -> None:
    """But for fp32's rounding of a factor."""
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def on_meta(kind: type, **config) -> nn.Module:
    with torch.device("meta"):
        return kind(**config)


@pytest.mark.parametrize("targets", [KINDS, ["attention"], ["feed_forward"]], ids=str)
def test_flux_as_diffusers_loader_reads_it(tmp_path, targets):
    """At FLUX.1's own width, which the loader expects. A weight's change is compared by what it does to three random inputs."""
    layers = written(tmp_path, on_meta(diffusers.FluxTransformer2DModel, num_layers=1, num_single_layers=1), targets)
    file = kohya.write_kohya(tmp_path)
    loaded = diffusers.FluxPipeline.lora_state_dict(str(tmp_path), weight_name=file.name, use_safetensors=True)
    names = {name.split(".lora_")[0].removeprefix("transformer.") for name in loaded}
    for name in names | layers.keys():
        A, B = (loaded[f"transformer.{name}.lora_{half}.weight"].double() for half in "AB")
        x = torch.randn(A.shape[1], 3, dtype=torch.float64)
        if name in layers:
            down, up = layers[name]
            assert_same(B @ (A @ x), ALPHA / RANK * up @ (down @ x))
        else:
            assert not B.any()
    assert len(load_file(file)) % 3 == 0 and all(name.startswith("lora_unet_") for name in load_file(file))


class Published(dict):
    """The changes of a published network's weights; of a weight that is not in it zeros."""

    def pop(self, name):
        return super().pop(name, torch.zeros(12, 1))


def test_sd3_as_diffusers_converter_of_whole_networks_reads_it(tmp_path):
    """Its blocks: one with two attentions, one with one, and the last, whose text ends."""
    network = on_meta(
        diffusers.SD3Transformer2DModel, num_layers=3, dual_attention_layers=(0,), attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=16, qk_norm="rms_norm",
    )  # fmt: skip
    layers, tensors = written(tmp_path, network, KINDS), load_file(kohya.write_kohya(tmp_path))
    changes = Published({"context_embedder.weight": torch.zeros(16, 1)})
    for name in {name.split(".")[0] for name in tensors}:
        down, up, alpha = (tensors[f"{name}.{part}"].double() for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        number, block, layer = re.fullmatch(r"lora_unet_joint_blocks_(\d+)_(x|context)_block_(\w+)", name).groups()
        layer = layer.replace("_", ".").replace("adaLN.modulation", "adaLN_modulation")
        changes[f"joint_blocks.{number}.{block}_block.{layer}.weight"] = alpha / len(down) * up @ down
    found = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(changes)
    assert not changes
    for name, (down, up) in layers.items():
        assert_same(found[f"{name}.weight"], ALPHA / RANK * up @ down)


def test_a_run_starts_from_it(family, tmp_path):
    """FLUX's joined attention comes apart again, each layer with its own rank. In its later blocks the loader expects FLUX.1's sizes."""
    pipe, scope = diffusers.FluxPipeline.from_pretrained(family("flux")), "transformer_blocks.0-1"
    del pipe.transformer.single_transformer_blocks[:]
    layers = written(tmp_path, pipe.transformer, ["attention"])
    set_trainable(pipe.transformer, scope, ["attention"], RANK, 8.0)
    assert f"16 of the 16 layers that are trained, rank {RANK} of {RANK}" in start_from(pipe, str(kohya.write_kohya(tmp_path)), scope)
    for name, (down, up) in layers.items():
        assert_same(pipe.transformer.get_submodule(name).get_delta_weight("default"), ALPHA / RANK * up @ down)


def test_zeros_of_a_joined_layer_are_no_layer(family, tmp_path):
    """Where attention alone has a LoRA, FLUX's joined layers have zeros for the rest."""
    pipe = diffusers.FluxPipeline.from_pretrained(family("flux"))
    layers = written(tmp_path, pipe.transformer, KINDS)
    file = tmp_path / "lora" / LORA_FILE
    tensors = {name: tensor * (".attn." in name) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    set_trainable(pipe.transformer, "all", ["attention"], RANK, 8.0)
    num_attention = sum(".attn." in name for name in layers)
    assert f"{num_attention} of the {num_attention} layers" in start_from(pipe, str(file), "all")


@pytest.mark.parametrize("kind", ["ChromaTransformer2DModel", None])
def test_other_transformers_are_refused(tmp_path, kind):
    """Chroma's layers have FLUX's names."""
    network = on_meta(diffusers.ChromaTransformer2DModel, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2)
    written(tmp_path, network, ["attention"], auto_mapping=kind and {"base_model_class": kind})
    what = f"it is a LoRA of a {kind or 'transformer'}, for which kohya's names are not known here; valid is one of a UNet, Flux"
    with pytest.raises(ValueError, match=what):
        kohya.write_kohya(tmp_path)
