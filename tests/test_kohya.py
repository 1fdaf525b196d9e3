"""The LoRA in kohya's format: its names and shapes, and that it is the same LoRA."""

import re
import shutil
from pathlib import Path

import bounds
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shared import conditions, policy_of

from ddpo_fast.policy import Policy
from ddpo_fast.records import kohya

RANK, ALPHA = 4, 3.0
EXPECTED = {  # of the tiny UNet: 16 and 32 channels, 16 wide text embeddings, a 64 wide time embedding
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": ((4, 32), (32, 4)),
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": ((4, 16), (32, 4)),
    "lora_unet_up_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0": ((4, 32), (32, 4)),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj": ((4, 32), (256, 4)),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2": ((4, 128), (32, 4)),
    "lora_unet_mid_block_attentions_0_proj_in": ((4, 32, 1, 1), (32, 4, 1, 1)),
    "lora_unet_down_blocks_0_resnets_0_conv1": ((4, 16, 3, 3), (16, 4, 1, 1)),
    "lora_unet_down_blocks_0_resnets_0_time_emb_proj": ((4, 64), (16, 4)),
    "lora_unet_down_blocks_1_resnets_0_conv_shortcut": ((4, 16, 1, 1), (32, 4, 1, 1)),
    "lora_unet_down_blocks_0_downsamplers_0_conv": ((4, 16, 3, 3), (16, 4, 1, 1)),
    "lora_unet_up_blocks_0_upsamplers_0_conv": ((4, 32, 3, 3), (32, 4, 1, 1)),
}


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory) -> tuple[Path, Policy]:
    """What a run with a LoRA on every kind of layer leaves behind, and the policy that it is of."""
    folder, policy = tmp_path_factory.mktemp("run"), policy_of(tiny_model, rank=RANK, alpha=ALPHA)
    torch.manual_seed(0)
    for parameter in policy.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    policy.export(folder)
    kohya.main([str(folder), "--output", str(folder / "mine.safetensors")])
    return folder, policy


def test_names_and_shapes(exported):
    folder, policy = exported
    tensors = load_file(folder / "mine.safetensors")
    for layer, (down, up) in EXPECTED.items():
        assert tensors[f"{layer}.lora_down.weight"].shape == down and tensors[f"{layer}.lora_up.weight"].shape == up
        assert tensors[f"{layer}.alpha"].shape == () and tensors[f"{layer}.alpha"] == ALPHA
    assert len(tensors) == 3 * len(policy.trainable_parameters()) // 2
    assert all(re.fullmatch(r"lora_unet_\w+\.(lora_down\.weight|lora_up\.weight|alpha)", name) for name in tensors)
    with safe_open(folder / "mine.safetensors", "pt") as file:
        said = {"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "3.0", "ss_output_name": "mine"}
        assert file.metadata() == said


def test_a_layer_grows_by_alpha_over_rank_up_down(exported):
    folder, policy = exported
    tensors, layer = load_file(folder / "mine.safetensors"), policy.network.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    down, up, alpha = (tensors[f"{next(iter(EXPECTED))}.{name}"] for name in ("lora_down.weight", "lora_up.weight", "alpha"))
    torch.testing.assert_close(layer.get_delta_weight("default"), alpha / 4 * up @ down)


def test_loaded_into_diffusers_it_predicts_the_same_noise(exported, tiny_model):
    folder, policy = exported
    latents, t, given = torch.randn(2, 4, 8, 8), torch.tensor([481, 21]), conditions(policy, ["a", "b"])
    (embeds,) = given.leaves
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None, requires_safety_checker=False)
    with torch.no_grad():
        expected = policy.predict(latents, t, given)
        untrained = pipe.unet(latents, t, encoder_hidden_states=embeds).sample
        pipe.load_lora_weights(folder, weight_name="mine.safetensors")
        loaded = pipe.unet(latents, t, encoder_hidden_states=embeds).sample
    assert (expected - untrained).abs().max() > 1e-2
    bounds.assert_same_output(loaded, expected, policy.network)


def test_the_folder_of_the_lora_still_loads_as_before(exported, tiny_model):
    """The default name is the run's, and beside lora/, whose file it does not hide."""
    folder, policy = exported
    kohya.main([str(folder)])
    assert (folder / f"{folder.name}.safetensors").stat().st_size > 0
    kohya.main([str(folder / "lora")])  # as it is when it comes from the hub
    assert (folder / "lora.safetensors").read_bytes()[-1000:] == (folder / f"{folder.name}.safetensors").read_bytes()[-1000:]
    assert [path.name for path in (folder / "lora").glob("*.safetensors")] == ["pytorch_lora_weights.safetensors"]


def test_mistakes_are_one_line(exported, tmp_path, capsys):
    folder, _ = exported
    (tmp_path / "full" / "unet").mkdir(parents=True)
    damaged = tmp_path / "damaged" / "lora"
    damaged.mkdir(parents=True)
    (damaged / "pytorch_lora_weights.safetensors").write_bytes(b"no")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    save_file({"unet.conv1.lora_A.weight": torch.ones(1)}, foreign / "pytorch_lora_weights.safetensors")
    for argv, message in (
        ([str(foreign)], "it does not say its rank and alpha; valid is what a run has written"),
        ([], "the following arguments are required: RUN_DIR"),
        ([str(tmp_path)], f"RUN_DIR={tmp_path}: no lora/ yet; valid is"),
        ([str(tmp_path / "full")], "fully fine-tuned, so that there is no LoRA: its unet/ is the result"),
        ([str(tmp_path / "damaged")], "pytorch_lora_weights.safetensors: cannot be read"),
        ([str(folder), "--output=x.pt"], "--output=x.pt: valid is a name that ends in .safetensors"),
    ):
        with pytest.raises(SystemExit, match="2"):
            kohya.main(argv)
        error = capsys.readouterr().err
        assert re.fullmatch(r"error: .*\n", error) and message in error


def test_the_folder_that_one_is_in(exported, tmp_path, monkeypatch):
    folder = shutil.copytree(exported[0] / "lora", tmp_path / "run" / "lora")
    monkeypatch.chdir(folder)
    for source in (Path("."), Path("pytorch_lora_weights.safetensors")):
        assert kohya.write_kohya(source) == tmp_path / "run" / "lora.safetensors"
