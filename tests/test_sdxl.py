"""SDXL, on a random tiny pipeline: whole runs, what the UNet is given, the VAE, the plan, the weights in plain diffusers."""

import bounds
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from shared import (
    CPU,
    REDNESS,
    command_line,
    conditions,
    first_gradient,
    kept,
    latent_shape,
    policy_of,
    random_lora,
    relative_error,
    run,
    weights,
)
from tiny import make_sdxl

from ddpo_fast import memory
from ddpo_fast.assemble import assemble
from ddpo_fast.config.command_line import parse
from ddpo_fast.kernels import select
from ddpo_fast.networks.fused_unet import fuse
from ddpo_fast.pipelines.template import Asked
from ddpo_fast.planning.counts import flop_counter
from ddpo_fast.planning.plan import make_plan, plan_text
from ddpo_fast.records.metrics import read_metrics

SMALL_LORA = dict(scope="all", targets=["attention"], rank=2, alpha=2.0)
PROMPTS = ["a", "b", "c", "a"]


@pytest.fixture
def options(sdxl, tmp_path):
    """Command lines of short runs: keyword arguments with __ for the dot."""
    (tmp_path / "reward.py").write_text(REDNESS)

    def make(name="run", **changed) -> list[str]:
        values = {
            "model.path": sdxl, "run.dir": tmp_path / name, "reward.name": f"{tmp_path}/reward.py:redness", "sample.num_samples": 4,
            "sample.num_steps": 3, "sample.batch_size": 4, "eval.num_samples": 2, "run.iterations": 1, "train.num_minibatches": 1,
            "lora.rank": 2, "train.learning_rate": 1e-3, "prompts.limit": 4, "prompts.samples_per_prompt": 1,
        }  # fmt: skip
        return command_line(values, changed)

    return make


def gradient(argv: list[str]) -> dict[str, torch.Tensor]:
    """Of the first update, before clipping, at LoRA's weights drawn at random."""
    return first_gradient(argv, torch.float32, torch.tensor([1.0, -2.0, 0.5, 1.5]), std=0.05, prompts=PROMPTS).gradient


def given_to_unet(unet, call) -> dict:
    """The first call's latents' number, embeddings and added conditions."""
    calls = []

    def hook(module, args, kwargs):
        calls.append({"rows": len(args[0]), "text": kwargs["encoder_hidden_states"], **kwargs["added_cond_kwargs"]})

    handle = unet.register_forward_pre_hook(hook, with_kwargs=True)
    call()
    handle.remove()
    return calls[0]


def test_a_run(options, reports):
    folder = run(options(run__iterations=2, train__num_minibatches=2, train__micro_batch=3))
    rows = read_metrics(folder)
    assert len(rows) == 3 and all(row["ratio_error"] <= bounds.of_run(folder).ratio and row["grad_norm"] > 0 for row in rows[1:])
    assert all(name.startswith("unet.") for name in weights(folder)) and (folder / "report.html").is_file()


@pytest.mark.parametrize("force_zeros", [True, False])
def test_the_unet_is_given_what_diffusers_gives_it(options, sdxl, tmp_path, force_zeros):
    path = sdxl if force_zeros else make_sdxl(tmp_path / "m", force_zeros=False)
    made = assemble(parse(options(model__path=path)))
    pipe = StableDiffusionXLPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    expected = given_to_unet(pipe.unet, lambda: pipe(PROMPTS, num_inference_steps=1, guidance_scale=3.0, output_type="latent"))
    rollouts = []
    ours = given_to_unet(made.policy.network, lambda: rollouts.append(kept(made, PROMPTS)))
    assert ours["rows"] == expected["rows"] == 8
    for key in ("text", "text_embeds", "time_ids"):
        bounds.assert_same_output(ours[key], expected[key], pipe.text_encoder_2)
    assert (ours["text"][:4] == 0).all() == (ours["text_embeds"][:4] == 0).all() == force_zeros
    assert ours["time_ids"].unique(dim=0).tolist() == [[16, 16, 0, 0, 16, 16]]
    held = conditions(made.policy, rollouts[0].prompts, 3.0).leaves  # what an update gives it of these samples
    for key in ("text", "text_embeds", "time_ids"):
        assert sum(leaf.shape == ours[key].shape and torch.equal(leaf, ours[key]) for leaf in held) == 1, key
    assert rollouts[0].prompts == PROMPTS and ours["text_embeds"].shape == (8, 12)


def test_an_empty_prompt_is_encoded(sdxl):
    """Zeros are the unconditional branch's alone."""
    policy = policy_of(sdxl, "fp32", **SMALL_LORA)
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    embeds, _, pooled, _ = pipe.encode_prompt("", do_classifier_free_guidance=False)
    given = conditions(policy, [""], 3.0).leaves
    for rows in (embeds, pooled):
        (leaf,) = (leaf for leaf in given if leaf.shape[1:] == rows.shape[1:])
        assert leaf[:1].abs().max() == 0 and torch.equal(leaf[1:], rows)


def test_gradient_is_that_of_the_textbook_loop(options):
    """Every sample and step on its own, noise and density written out from the cumulative alphas."""
    found = gradient(options())
    made = assemble(parse(options("again", lora__forward="separate")))
    random_lora(made.policy, 0.05)
    rollout = kept(made, PROMPTS)
    bound = bounds.of(made.config)
    pipe, alphas = made.policy.pipe, (1 - made.policy.pipe.scheduler.betas.double()).cumprod(0)
    for i, (prompt, advantage) in enumerate(zip(PROMPTS, (1.0, -2.0, 0.5, 1.5))):
        embeds, uncond, pooled, uncond_pooled = pipe.encode_prompt(prompt)
        for k, t in enumerate(rollout.schedule.times.tolist()):
            x, y = rollout.latents[i : i + 1, k], rollout.latents[i : i + 1, k + 1]
            e, e_uncond = (
                pipe.unet(
                    x, t, encoder_hidden_states=text,
                    added_cond_kwargs={"text_embeds": vector, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])},
                ).sample.double()
                for text, vector in ((embeds, pooled), (uncond, uncond_pooled))
            )  # fmt: skip
            e = e_uncond + 3 * (e - e_uncond)
            a_t, a_p = alphas[t], alphas[t - 333] if t >= 333 else alphas[0]
            s = ((1 - a_p) / (1 - a_t) * (1 - a_t / a_p)).sqrt()
            mean = a_p.sqrt() * (x - (1 - a_t).sqrt() * e) / a_t.sqrt() + (1 - a_p - s**2).sqrt() * e
            log_prob = torch.distributions.Normal(mean, s).log_prob(y.double()).mean()
            assert log_prob.item() == pytest.approx(rollout.log_probs[i, k].item(), rel=0, abs=bound.ratio)
            (-advantage * log_prob / 12).backward()
    expected = {n: p.grad for n, p in pipe.unet.named_parameters() if p.grad is not None}
    assert relative_error(found, expected) <= bound.gradient


@pytest.mark.rounding
def test_every_way_to_compute_has_the_same_gradient(options):
    expected, bound = gradient(options(model__share_guidance="false", lora__forward="separate")), bounds.of(parse(options())).gradient
    for name, changed in {
        "merged": {"lora__forward": "merged"},
        "checkpointing": {"train__gradient_checkpointing": "true"},
        "micro-batches": {"train__micro_batch": 5},
        "scores": {"train__estimator": "score_accumulation"},
        "math attention": {"attention__backend": "math"},
    }.items():
        assert relative_error(gradient(options(name, **changed)), expected) <= bound, name


def test_fused_kernels_compute_the_same(sdxl):
    policy = policy_of(sdxl, "fp32", **SMALL_LORA)
    for parameter in policy.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = torch.randn(1, *latent_shape(policy)).repeat(2, 1, 1, 1), torch.tensor([481, 481]), conditions(policy, ["a"], 3.0)

    def compute() -> list[torch.Tensor]:
        policy.network.zero_grad()
        y = policy.predict(*inputs)
        y.square().mean().backward()
        return [y.detach(), *(parameter.grad.clone() for parameter in policy.trainable_parameters())]

    expected, fused = compute(), fuse(policy.network, select("triton", CPU))
    assert fused["geglu"] == 2 + 2 + 2 * 2 and fused["group_norm_silu"] > 0
    bounds.assert_same_network(compute(), expected, policy.network)


@pytest.mark.rounding
def test_the_cache_changes_nothing(options):
    """Not a bit, where the update's calls have as many rows as those of sampling."""
    same = dict(lora__scope="mid_up", train__inner_epochs=2, train__micro_batch=4)
    with_cache, without = (run(options(mode, cache__mode=mode, **same)) for mode in ("on", "off"))
    assert [row["cache_hit_fraction"] for row in read_metrics(with_cache)[1:]] == [1.0]
    assert all(torch.equal(tensor, weights(without)[name]) for name, tensor in weights(with_cache).items())


def test_saved_weights_are_the_policy_in_plain_diffusers(options, sdxl):
    made = assemble(parse(options(lora__alpha=3.0)))
    policy, t = made.policy, torch.tensor([481, 21])
    latents, given = torch.randn(2, 4, 8, 8), conditions(policy, ["a", "b"])
    with torch.no_grad():
        untrained = policy.predict(latents, t, given)  # LoRA starts at 0
        for parameter in policy.trainable_parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        expected = policy.predict(latents, t, given)
    policy.export(made.directory.path)
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    pipe.load_lora_weights(made.directory.path / "lora")
    embeds, _, pooled, _ = zip(*(pipe.encode_prompt(prompt, do_classifier_free_guidance=False) for prompt in ("a", "b")))
    added = {"text_embeds": torch.cat(pooled), "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}
    with torch.no_grad():
        loaded = pipe.unet(latents, t, encoder_hidden_states=torch.cat(embeds), added_cond_kwargs=added).sample
    assert (expected - untrained).abs().max() > 1e-2
    bounds.assert_same_output(loaded, expected, policy.network)


def test_full_fine_tuning(options, sdxl):
    folder = run(options(lora__scope="none"))
    trained, base = (UNet2DConditionModel.from_pretrained(path, subfolder="unet") for path in (folder, sdxl))
    changed = {name for (name, a), b in zip(trained.named_parameters(), base.parameters()) if not torch.equal(a, b)}
    assert "add_embedding.linear_1.weight" in changed and len(changed) > 0.9 * len(list(base.parameters()))


def test_embeddings_that_were_used_last_are_kept(sdxl, monkeypatch):
    """Three prompts are kept; what is encoded again is the same, and what is needed together is encoded once."""
    policy = policy_of(sdxl, "fp32", **SMALL_LORA)
    asked = Asked(10, 3.0)

    def given(*prompts: str) -> list[torch.Tensor]:
        texts, rows = policy.texts(policy.record(asked), [*prompts])
        return texts.gather(torch.from_numpy(rows))

    def kept() -> list[str]:
        assert all(way == asked.texts for way, _ in policy._texts)
        return [prompt for _, prompt in policy._texts]

    expected = given(*"abcde")
    (size,) = {sum(row.untyped_storage().nbytes() for row in rows) for rows in policy._texts.values()}
    assert size == make_plan(parse([f"--model.path={sdxl}", "--plan", "--model.dtype=fp32"])).counts.embed_bytes
    monkeypatch.setattr(memory, "MIB", 1)
    monkeypatch.setattr(memory, "PROMPT_EMBEDS_MIB", 4 * size - 1)
    encoded, encode = [], StableDiffusionXLPipeline.encode_prompt

    def noting(pipe, prompt, *args, **kwargs):
        encoded.extend(prompt)
        return encode(pipe, prompt, *args, **kwargs)

    monkeypatch.setattr(StableDiffusionXLPipeline, "encode_prompt", noting)

    def newly_encoded(*prompts: str) -> list[str]:
        encoded.clear()
        rows = [ord(prompt) - ord("a") for prompt in prompts]
        assert all(torch.equal(leaf, whole[rows]) for leaf, whole in zip(given(*prompts), expected, strict=True))
        return [*encoded]

    assert newly_encoded("c", "d") == [] and kept() == ["e", "c", "d"]
    assert newly_encoded("a", "e") == ["a"] and kept() == ["d", "a", "e"]
    assert newly_encoded("b", "a", "c", "d", "b", "e") == ["b", "c"] and kept() == ["b", "a", "c", "d", "e"]
    assert newly_encoded("d") == [] and kept() == ["c", "e", "d"]


def test_both_text_encoders_are_on_the_device_while_prompts_are_new(sdxl, monkeypatch):
    policy, moves = policy_of(sdxl, "fp32", **SMALL_LORA), []
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(policy.pipe, name)
        monkeypatch.setattr(encoder, "to", lambda device, name=name: moves.append((name, str(device))))
    policy.offload_text_encoder = True
    there_and_back = [("text_encoder", "cpu"), ("text_encoder_2", "cpu")] * 2
    recording = policy.record(Asked(5, 3.0))  # evaluation's steps may be others than sampling's, and recorded after the encoders have gone
    assert moves == there_and_back
    policy.texts(recording, ["new"])
    assert moves == 2 * there_and_back
    policy.texts(policy.record(Asked(5, 3.0)), ["new"])
    assert moves == 2 * there_and_back


def test_in_fp16_the_vae_decodes_in_fp32_if_it_says_so(sdxl, tmp_path):
    """Its own does; another one, for `model.vae`, does not."""
    policy = policy_of(sdxl, "fp16", **SMALL_LORA)
    assert policy.pipe.vae.dtype == torch.float32 and policy.pipe.unet.conv_in.weight.dtype == torch.float16
    recording = policy.record(Asked(10, 3.0))
    latents = torch.randn(2, *recording.shape)
    own = AutoencoderKL.from_pretrained(sdxl, subfolder="vae")
    with torch.no_grad():
        expected = (own.decode(latents / own.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    tolerance = bounds.SIGMAS * bounds.network_rounding(own.decoder, torch.float16) / 2  # its weights are rounded to fp16
    assert (policy.decode(latents, recording) - expected).abs().max() <= tolerance < 0.2 * expected.std()

    torch.manual_seed(3)
    mean, std = [0.1, 0.2, -0.3, 0.4], [1.0, 2.0, 3.0, 0.5]
    other = AutoencoderKL.from_config({**own.config, "force_upcast": False, "latents_mean": mean, "latents_std": std})
    other.save_pretrained(tmp_path / "vae")
    policy = policy_of(sdxl, "fp16", None, str(tmp_path / "vae"), **SMALL_LORA)
    assert policy.pipe.vae.dtype == torch.float16
    scaled = latents / other.config.scaling_factor * torch.tensor(std).view(4, 1, 1) + torch.tensor(mean).view(4, 1, 1)
    with torch.no_grad():
        expected = (other.decode(scaled).sample / 2 + 0.5).clamp(0, 1)
    assert (policy.decode(latents, policy.record(Asked(10, 3.0))) - expected).abs().max() <= tolerance
    assert policy.pipe.vae.config.force_upcast is False


def test_the_plan_counts_what_is_loaded(options, sdxl):
    """In fp16, where the VAE is in fp32."""
    argv = options(model__dtype="fp16", lora__targets="[attention]", model__offload_text_encoder="false", run__plan="H200")
    plan, policy = make_plan(parse(argv)), policy_of(sdxl, "fp16", **SMALL_LORA)
    frozen = {
        name: sum(p.nbytes for p in getattr(policy.pipe, name).parameters() if not p.requires_grad)
        for name in ("unet", "vae", "text_encoder", "text_encoder_2")
    }
    assert plan.counts.weight_bytes == frozen | {"merged": 0}
    given, latents = conditions(policy, ["a"]), torch.randn(1, *latent_shape(policy)).half()
    assert plan.counts.embed_bytes == sum(leaf.nbytes for leaf in given.leaves)
    assert plan.counts.trained_shapes == tuple(tuple(p.shape) for p in policy.trainable_parameters())
    with flop_counter() as flops, torch.no_grad():
        policy.predict(latents, torch.tensor([481]), given)
    assert plan.counts.forward.row_flop == flops.get_total_flops()
    assert plan_text(plan).endswith("it fits")
