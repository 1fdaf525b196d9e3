"""The VAE where memory is short: in tiles, and on the device only while it decodes."""

import pytest
import torch
from shared import CPU

from ddpo_fast import kernels
from ddpo_fast.assemble import find, load_policy
from ddpo_fast.config.command_line import parse
from ddpo_fast.distributed.ranks import Ranks
from ddpo_fast.pipelines.skeleton import tile
from ddpo_fast.pipelines.template import Asked
from ddpo_fast.planning.counts import MIB, LiveBytes
from ddpo_fast.planning.plan import count_run
from ddpo_fast.policy import Policy


def loaded(argv: list[str]) -> Policy:
    config = parse(argv)
    return load_policy(config, find(config), Ranks(), CPU, kernels.select("reference", CPU))[1]


def test_a_large_picture_is_decoded_in_tiles_which_the_plan_counts(flow_options):
    argv = flow_options("sd3", sample__height=128, sample__width=128, model__vae_tiling="true", model__dtype="fp32", cache__mode="off")
    config, policy, sizes = parse(argv), loaded(argv), []
    counts, recording = count_run(config, find(config), torch.float32, on_gpu=False), policy.record(Asked.of(config.sample))
    vae, x = policy.pipe.vae, torch.randn(1, *recording.shape, generator=torch.Generator().manual_seed(0))
    vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-1]))
    with LiveBytes() as live, torch.no_grad():
        pictures = policy.decode(x, recording)
    assert pictures.shape == (1, 3, 128, 128) and len(sizes) > 1
    assert counts.decode.mib(1) == pytest.approx(live.peak / MIB, rel=0.05) and counts.decode.row_flop == live.flop
    vae.disable_tiling()
    with LiveBytes() as whole, torch.no_grad():
        policy.decode(x, recording)
    assert whole.peak > 1.3 * live.peak


def test_a_vae_without_tiles_is_refused():
    with pytest.raises(ValueError, match="^model.vae_tiling=true: diffusers' Linear has no tiles; valid is false$"):
        tile(torch.nn.Linear(1, 1))


def test_a_vae_is_on_the_device_while_it_decodes(options, monkeypatch):
    """And the plan of a GPU counts it there. Its pictures are the same."""
    policy, moves = loaded(options(model__offload_vae="true", model__dtype="fp32")), []
    vae, decode = policy.pipe.vae, policy.pipe.vae.decode
    monkeypatch.setattr(vae, "to", lambda device: moves.append(str(device)))
    monkeypatch.setattr(vae, "decode", lambda *args, **kwargs: moves.append("decodes") or decode(*args, **kwargs))
    recording = next(iter(policy._recordings.values()))
    policy.device, x = torch.device("cpu", 0), torch.randn(3, *recording.shape)
    policy.decode_batch = 2
    found = policy.decode(x, recording)
    assert moves == ["cpu:0", "decodes", "decodes", "cpu"]
    policy.offload_vae = False
    assert torch.equal(policy.decode(x, recording), found) and moves[4:] == ["cpu:0", "decodes", "decodes"]
    config = parse(options(model__offload_vae="true", run__plan="H200"))
    counts, num_bytes = count_run(config, find(config), torch.float16, on_gpu=True), sum(p.nbytes // 2 for p in vae.parameters())
    assert counts.weight_bytes["vae"] == 0 and counts.decode.fixed_bytes >= num_bytes > 0
