"""Defaults that depend on the model: what was published of its family."""

import json

import pytest
from conftest import LEFT_TO_THE_FAMILY
from families import CALL, FAMILIES

from ddpo_fast import assemble
from ddpo_fast.config import command_line as parsing
from ddpo_fast.config.command_line import parse
from ddpo_fast.config.options import Config
from ddpo_fast.config.published import EMBEDDED
from ddpo_fast.pipelines import hub
from ddpo_fast.pipelines.families import FAMILIES as KINDS
from ddpo_fast.pipelines.template import Asked
from ddpo_fast.planning.work import Calls, Work
from ddpo_fast.schedule import Denoising

KNOWN = {model: name for name, kind in KINDS.items() for model in kind.models}


def named(folder, name: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return str(folder)


def differs(config: Config) -> dict[str, object]:
    """The options that are not as without a model, less those of the run and the model."""
    plain = parse([])
    names = (f"{section}.{key}" for section, values in vars(config).items() if section not in ("model", "run") for key in vars(values))
    return {name: config[name] for name in names if config[name] != plain[name]}


@pytest.mark.parametrize("name", KINDS)
def test_a_folders_class_decides(name, tmp_path):
    """Every published setting is valid, and nothing else is changed. The command line wins."""
    path, plain, published = f"--model.path={named(tmp_path, name)}", parse([]), KINDS[name].published
    assert differs(parse([path])) == {option: value for option, value in published.items() if value != plain[option]}
    changed = parse([path, "--sample.num_steps=3", "--lora.targets=[feed_forward]", "--train.learning_rate=1"])
    assert (changed.sample.num_steps, changed.lora.targets, changed.train.learning_rate) == (3, ["feed_forward"], 1.0)
    assert changed.sample.guidance_scale == published["sample.guidance_scale"]
    assert parse([path, "--lora.scope=none"]).train.learning_rate == 1e-5
    assert parse([]) == plain


def test_eta_and_window_are_those_of_the_familys_sampler(tmp_path):
    flow, embedded = f"--model.path={named(tmp_path, 'FluxPipeline')}", f"--model.path={EMBEDDED}/flow_model"
    for asked, eta in (([], 0.9), (["--sample.sampler=flow_sde"], 0.9), (["--sample.sampler=cps"], 1.0)):
        assert parse([flow, *asked]).sample.eta == eta
    assert parse([embedded, "--sample.sampler=ode", "--train.algorithm=rwr"]).sample.window is None


def test_a_published_model_fits_one_gpu_or_eight(tmp_path):
    for name in KINDS:
        config = parse([f"--model.path={named(tmp_path / name, name)}"])
        assert (config.sample.batch_size, config.train.micro_batch) == ("auto", "auto")
        assert all(Work.of(config, Calls(2, 2, 2, 10)).share(ranks) for ranks in (1, 2, 4, 8))


def test_a_recipe_names_the_model_and_wins(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{path: {named(tmp_path / 'model', 'FluxPipeline')}}}\nsample: {{eta: 0.5}}")
    config = parse([f"--config={recipe}"])
    assert (config.sample.num_steps, config.sample.eta, config.sample.sampler) == (6, 0.5, "flow_sde")
    other = parse([f"--config={recipe}", f"--model.path={named(tmp_path / 'other', 'StableDiffusion3Pipeline')}"])
    assert (other.sample.num_steps, other.sample.eta, other.sample.guidance_scale) == (10, 0.5, 4.5)


def test_what_there_is_no_model_of_has_the_demos_defaults(tmp_path):
    """Whoever opens it refuses it, with the reason."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    for path in (tmp_path / "broken", named(tmp_path / "other", "KolorsPipeline"), named(tmp_path / "list", ["a"])):
        assert differs(parse([f"--model.path={path}"])) == {}


def test_a_class_without_an_entry_has_flow_grpos_if_it_is_asked_for(tmp_path):
    path = f"--model.path={named(tmp_path, 'OvisImagePipeline')}"
    assert differs(parse([path])) == {}
    config = parse([path, "--model.unlisted=true"])
    assert (config.sample.sampler, config.sample.guidance_scale, config.eval.sampler, config.lora.rank) == ("flow_sde", 4.0, "ode", 32)


def test_embedded_models_have_the_demos():
    assert differs(parse([f"--model.path={EMBEDDED}/model"])) == {}
    assert parse([f"--model.path={EMBEDDED}/flow_model", "--lora.scope=none"]).train.learning_rate == 2e-3
    flow = parse([f"--model.path={EMBEDDED}/flow_model"])
    assert (flow.sample.sampler, flow.sample.window, flow.eval.sampler, flow.train.learning_rate) == (
        "cps", {"size": 6, "among": 6}, "ode", 2e-3,
    )  # fmt: skip


@pytest.mark.parametrize("model", KNOWN)
def test_known_models_need_no_hub(model, monkeypatch):
    monkeypatch.setattr(hub, "local_folder", lambda *_: pytest.fail("it asks the hub"))
    assert parse([f"--model.path={model}"]).sample.num_steps == KINDS[KNOWN[model]].published["sample.num_steps"]


def test_other_models_of_the_hub_are_asked_for(monkeypatch, tmp_path):
    named(tmp_path, "SanaPipeline")
    asked = []
    monkeypatch.setattr(hub, "local_folder", lambda option, source: asked.append((option, source)) or tmp_path)
    assert parse(["--model.path=org/model"]).sample.sampler == "flow_sde"
    assert asked == [("model.path", "org/model")]

    def fails(option, source):
        raise ValueError(f"{option}={source}: cannot be reached")

    monkeypatch.setattr(hub, "local_folder", fails)
    with pytest.raises(ValueError, match="^model.path=org/model: cannot be reached$"):
        parse(["--model.path=org/model"])


def test_a_resumed_run_keeps_what_it_began_with(tmp_path, monkeypatch):
    """A family's settings may have changed since; its config.yaml has all of them, so its model is not looked at."""
    model, began = named(tmp_path / "model", "FluxPipeline"), tmp_path / "run"
    (began / "checkpoints" / "1").mkdir(parents=True)
    (began / "checkpoints" / "1" / "state.json").write_text("{}")
    (began / "config.yaml").write_text(
        parse([f"--model.path={model}", f"--run.dir={tmp_path / 'new'}"]).replace(run__dir=str(began)).to_yaml()
    )
    monkeypatch.setattr(parsing, "published", lambda *_: pytest.fail("it is looked at"))
    assert parse([f"--run.dir={began}", "--resume"]).sample.num_steps == 6


@pytest.mark.parametrize("name", FAMILIES)
def test_published_settings_fit_the_familys_own_pipeline(name, family):
    """Of its tiny pipeline: the sampler takes its levels, every step of the SDE has a density, and the guidance has its branches."""
    path, call = family(name), CALL[name]
    kind = KINDS[json.loads((path / "model_index.json").read_text())["_class_name"]]
    own = {key: value for key, value in call.items() if key not in LEFT_TO_THE_FAMILY | {kind.guidance}}
    size = f"--sample.height={call['height']}", f"--sample.width={call['width']}", f"--model.arguments={json.dumps(own)}"
    config = parse([f"--model.path={path}", *size])
    model = assemble.find(config)
    recording = model.record(Asked.of(config.sample))
    assert Denoising.of(config.sample, recording, model.scheduler).num_trainable == config.sample.num_steps
    assert recording.num_branches == (1 if name == "flux" else 2)
    without = config.replace(sample__guidance_scale=kind.no_guidance)
    assert assemble.find(without).record(Asked.of(without.sample)).num_branches == 1
    with pytest.raises(ValueError, match=f"^sample.guidance_scale=.*: valid for .* is a finite number >= {kind.no_guidance:g}$"):
        assemble.find(config.replace(sample__guidance_scale=kind.no_guidance - 0.1))
