"""The plan of a flow transformer: what is counted of its configs is what a run of its pipeline has, for every family."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from shared import CPU

from ddpo_fast import assemble, kernels
from ddpo_fast import train as trainer
from ddpo_fast.config.command_line import parse
from ddpo_fast.distributed.ranks import Ranks
from ddpo_fast.networks.split import Split, stored_bytes
from ddpo_fast.pipelines.template import Asked
from ddpo_fast.planning import counts as counting
from ddpo_fast.planning.counts import MIB, LiveBytes, flop_counter
from ddpo_fast.planning.plan import calls_on, count_run, with_cache
from ddpo_fast.planning.work import Work


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(counting, "ROWS", (2, 4))  # some networks loop over rows


def weight_bytes(policy) -> dict[str, int]:
    parts = {name: part for name, part in policy.pipe.components.items() if isinstance(part, torch.nn.Module)}
    found = {name: sum(p.nbytes for p in part.parameters() if not p.requires_grad) for name, part in parts.items()}
    return found | {"merged": sum(layer.merged_weight.nbytes for layer in policy.merged_layers)}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_counted_is_what_a_run_has(flow_options, name):
    """Weights, texts, latents, operations, the bytes alive in a call and those that a cache keeps; of two rows with the run's prompt."""
    config = parse(flow_options(name, model__dtype="fp32", lora__scope="last:0.3", prompts__list="[a b]"))
    model = assemble.find(config)
    counts, work = count_run(config, model, torch.float32, on_gpu=False), Work.of(config, calls_on(model, config))
    _, policy = assemble.load_policy(config, model, Ranks(), CPU, kernels.select("reference", CPU))
    recording = policy.record(Asked.of(config.sample))
    assert (work.rows, work.trained_rows, work.population) == (recording.num_branches, recording.num_branches, 3)
    assert sorted(counts.trained_shapes) == sorted(tuple(p.shape) for p in policy.trainable_parameters())
    assert counts.weight_bytes == weight_bytes(policy) and counts.weight_bytes["transformer"] > 0
    texts, (row,) = policy.texts(recording, ["a b"])
    kept_rows = policy._texts[recording.asked.texts, "a b"]
    assert counts.embed_bytes == sum(row.untyped_storage().nbytes() for row in kept_rows if isinstance(row, torch.Tensor)) > 0

    def forward(num_rows: int = 2) -> torch.Tensor:
        torch.manual_seed(0)
        x, times = torch.randn(num_rows, *recording.shape), recording.times[1].expand(num_rows)
        return recording.template.call(policy.network, x, times, texts.gather(torch.tensor([0, row])))

    with torch.no_grad(), LiveBytes() as live:
        x = forward()
    assert counts.num_latents == x[0].numel() and live.flop == 2 * counts.forward.row_flop
    assert counts.forward.mib(2) == pytest.approx(live.peak / MIB, rel=0.03)
    with flop_counter() as flops:
        forward().square().mean().backward()
    assert flops.get_total_flops() == 2 * counts.update.row_flop
    with torch.no_grad(), flop_counter() as flops:
        pictures = policy.decode(x[:1], recording)
    assert flops.get_total_flops() == counts.decode.row_flop and counts.image_bytes == pictures.nbytes
    split = Split(policy.network, forward)
    with flop_counter() as flops:
        kept = split.run_prefix(forward)
    assert counts.kept_row_bytes == sum(stored_bytes(tensor[:1]) for tensor in kept) > 0
    assert flops.get_total_flops() == 2 * counts.prefix_flop > 0


def test_text_encoders_of_which_a_part_stays_fp32(flow_options):
    """T5's in fp16; the network's texts and the VAE are fp16."""
    config = parse(flow_options("sd3", model__dtype="fp16", lora__rank=4))
    model = assemble.find(config)
    counts = count_run(config, model, torch.float16, on_gpu=False)
    policy = assemble.load_policy(config, model, Ranks(), CPU, kernels.select("reference", CPU))[1]
    assert counts.weight_bytes == weight_bytes(policy)
    recording = policy.record(Asked.of(config.sample))
    policy.texts(recording, ["a"])
    assert counts.embed_bytes == sum(row.nbytes for row in policy._texts[recording.asked.texts, "a"])


def test_a_whole_network_in_half_precision_is_counted(flow_options):
    """Its weights are fp32 masters, under autocast as in a run."""
    config = parse(flow_options("flux", model__dtype="bf16", lora__scope="none"))
    counts = count_run(config, assemble.find(config), torch.bfloat16, on_gpu=False)
    assert counts.weight_bytes["transformer"] == 0 < counts.num_trainable and counts.update.row_flop > counts.forward.row_flop > 0


def test_a_plan_and_sizes_that_it_chooses(flow_options, tmp_path, capsys):
    options = flow_options("sd3", sample__batch_size="auto", train__micro_batch="auto")
    trainer.main([*options, "--plan"])
    out = capsys.readouterr().out
    assert "batches of 4, 2 network rows each sample" in out and "24 network rows, of which" in out and out.endswith("it fits\n")
    assert not (tmp_path / "run").exists()


def test_a_network_that_cannot_be_split_is_refused_unless_the_cache_is_off(flow_options):
    config = parse(flow_options("lumina2", lora__scope="noise_refiner.0"))
    model = assemble.find(config)
    counts, work = count_run(config, model, torch.float32, on_gpu=False), Work.of(config, calls_on(model, config))
    with pytest.raises(ValueError, match=r"^cache.mode=auto: this network uses what its first blocks return .*; valid is off$"):
        with_cache(work, config, counts, 1000, 1, on_gpu=False)
    assert with_cache(work, config.replace(cache__mode="off"), counts, 1000, 1, on_gpu=False) == replace(work, held=(0, 0))
