"""What a policy proves before a run begins: its network's call is the pipeline's, and stays so when it is made faster."""

import functools
import inspect
import re

import pytest
import torch
from families import CALL
from shared import CPU, policy_of, run, sampled
from torch.utils._pytree import tree_leaves

from ddpo_fast import assemble as assembling
from ddpo_fast import train as trainer
from ddpo_fast.assemble import assemble
from ddpo_fast.config.command_line import parse
from ddpo_fast.config.options import LoraConfig
from ddpo_fast.pipelines.folders import find_model
from ddpo_fast.pipelines.recorder import Recorder
from ddpo_fast.pipelines.template import Asked, Template
from ddpo_fast.planning.plan import make_plan
from ddpo_fast.policy import Policy


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_network_gives_its_pipeline_s_own_bits(tiny_model, monkeypatch, guidance_scale):
    """In the first and in the last of 10 steps; the others run without the network."""
    found, own_outputs = [], Recorder.own_outputs
    monkeypatch.setattr(Recorder, "own_outputs", lambda *args: found.append(own_outputs(*args)) or found[-1])
    policy = Policy(find_model(str(tiny_model)), "fp32", CPU, LoraConfig())
    recording = policy.record(Asked(10, guidance_scale))
    ((first, last),) = found
    assert (first[0], last[0]) == (0, 9) and len(first[2]) == len(last[2]) == recording.num_branches
    texts, (row,) = policy.texts(recording, ["a"])
    for step, x, outputs in (first, last):
        times, index = recording.times[step].expand(len(outputs)), torch.tensor([0] * (len(outputs) - 1) + [row])
        ours = recording.template.call(policy.network, torch.cat([x] * len(outputs)), times, texts.gather(index))
        assert torch.equal(ours, torch.cat(outputs)) and ours.std() > 0


def test_a_call_that_is_not_the_pipeline_s_is_refused(tiny_model, monkeypatch):
    call = Template.call
    monkeypatch.setattr(Template, "call", lambda self, network, x, times, texts: call(self, network, x, times + 1, texts))
    with pytest.raises(ValueError, match=r"^model.path=\S+: in step 0 its network gives numbers that are not its pipeline's, by \S+ of"):
        policy_of(tiny_model)


def test_a_network_that_has_changed_is_refused(options, monkeypatch):
    """After it has been merged, fused, laid out and given to the engine."""
    attach = Policy.attach

    def spoiling(policy, *args, **kwargs):
        attach(policy, *args, **kwargs)
        policy.network.conv_in.weight.data *= 1.1

    monkeypatch.setattr(Policy, "attach", spoiling)
    with pytest.raises(ValueError, match=r"^model.path=\S+: made ready for the run, its network gives numbers that it did not before"):
        assemble(parse(options()))


def test_pictures_of_another_size(options, tiny_model):
    """A run draws 24 x 16 pixels and evaluates at 32 x 32, of a model whose own pictures are 16 x 16; --plan counts those latents."""
    size = {"sample__height": 24, "sample__width": 16, "eval__height": 32, "eval__width": 32}
    folder = run(options(run__iterations=1, **size))
    made = assemble(parse(options("again", **size)))
    rollout, _, images = sampled(made, ["a", "b"])
    assert rollout.latents.shape[2:] == made.denoising.recording.shape == (4, 12, 8) and images.shape[1:] == (3, 24, 16)
    assert made.evaluating.recording.shape == (4, 16, 16)
    text = (folder / "lora" / "README.md").read_text()
    assert "eta=1.0, height=32, width=32)" in text
    assert make_plan(parse([*options("plan", **size), "--plan"])).counts.num_latents == 4 * 12 * 8


def test_a_prompt_that_is_too_long_is_named_once(options, caplog, capfd):
    """Its tokenizer has 8 tokens, of which the first and the last are not the prompt's."""
    long = "b" * 100
    policy = assemble(parse(options(prompts__list=f'["a", "{long}"]'))).policy
    recording = policy.record(Asked(5, 3.0))
    for prompt in (long, "a", long, "bbbbbb"):
        policy._texts.clear()
        policy.texts(recording, [prompt])
    said = [record.message for record in caplog.records]
    assert said == [f"the prompt '{'b' * 60}...' is too long: tokenizer cuts 94 of its 100 tokens"]
    assert "truncated" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "name, changed, message",
    [
        ("tiny", {"sample__height": 21, "sample__width": 16}, "sample.height=21, sample.width=16: .* divisible by 8 but are 21 and 16"),
        (
            "tiny",
            {"eval__height": 16, "eval__width": 20},
            "eval.height=16, eval.width=20: `height` and `width` have to be divisible by 8 but are 16 and 20",
        ),
        ("tiny", {"model__arguments": '{"clip_skip": 9}'}, 'model.arguments={"clip_skip": 9}: tuple index out of range'),
        ("sdxl", {"model__arguments": '{"negative_prompt": 3}'}, 'model.arguments={"negative_prompt": 3}: text input must be of type'),
        ("sdxl", {"eval__height": 21, "eval__width": 16}, "eval.height=21, eval.width=16: .* divisible by 8 but are 21 and 16"),
        ("sd3", {"sample__height": 72}, "sample.height=72, sample.width=64: .* divisible by 16 but are 72 and 64"),
        ("sd3", {"model__arguments": '{"max_sequence_length": 600}'}, "model.arguments={.*: `max_sequence_length` cannot be greater than"),
        ("flux", {"sample__height": 72}, "sample.height=72, sample.width=64: its pipeline draws 64 x 64 pixels instead"),
        ("qwen_image", {"eval__height": 64, "eval__width": 72}, "eval.height=64, eval.width=72: its pipeline draws 64 x 64 pixels instead"),
        ("hidream", {"sample__height": 256}, "sample.height=256, sample.width=128: its pipeline draws 180 x 90 pixels instead"),
    ],
)
def test_a_call_that_the_pipeline_refuses_is_one_line_before_weights_are_read(
    options, flow_options, sdxl, monkeypatch, capsys, name, changed, message
):
    """Or one of a size that it changes without an error. `--plan` says the same."""
    monkeypatch.setattr(assembling, "Policy", lambda *args: pytest.fail("the model was loaded"))
    if name in ("tiny", "sdxl"):
        argv = options(**{"model__path": sdxl} if name == "sdxl" else {}, **changed)
    else:
        argv = flow_options(name, **changed)
    for ways in ([], ["--plan"]):
        with pytest.raises(SystemExit, match="2"):
            trainer.main([*argv, *ways])
        assert re.fullmatch(rf"error: {message}[^\n]*\n", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "qwen_image", "z_image", "sana"])
def test_text_encoders_may_run_elsewhere_than_the_network(name, tiny_model, family, monkeypatch):
    """Torch takes cpu:0 for another device than cpu, and both are this one: so who is asked for which can be seen."""
    path, call = (tiny_model, {"height": 16, "width": 16}) if name == "sd" else (family(name), CALL[name])
    model = find_model(str(path), arguments={key: value for key, value in call.items() if key == "max_sequence_length"})
    asked, device, encodes_on = Asked(2, 3.0, call["height"], call["width"]), torch.device("cpu", 0), []
    encode = model.kind.encode_prompt

    @functools.wraps(encode)
    def watched(*args, **kwargs):
        encodes_on.append(inspect.signature(encode).bind(*args, **kwargs).arguments["device"])
        return encode(*args, **kwargs)

    monkeypatch.setattr(model.kind, "encode_prompt", watched)
    leaves = []
    for host in (None, CPU):
        policy = Policy(model, "fp32", device, LoraConfig(), host)
        leaves.append(policy.texts(policy.record(asked), ["a cat"])[0].leaves)
        assert encodes_on and {str(found) for found in encodes_on} == {str(host or device)}
        encodes_on.clear()
    for a, b in zip(*map(tree_leaves, leaves)):
        torch.testing.assert_close(a, b)  # where memory lies decides the order of sums
