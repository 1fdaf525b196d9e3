"""The benchmarks' contenders do the same work, and a wrong one is refused before anything is timed."""

from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import create_autospec

import bounds
import pytest
import torch
from shared import AS_EMBEDDED
from test_plan import COUNTS

from bench import contenders, harness, models, peers, predict, throughput, waterfall
from bench.contenders import Ours, Stages, Textbook, make
from bench.rows import Writer, read
from ddpo_fast.config.command_line import parse
from ddpo_fast.kernels import reference


@pytest.fixture
def argv(tiny_model, tmp_path):
    return [
        f"--model.path={tiny_model}", *(f"--{name}={value}" for name, value in AS_EMBEDDED.items()),
        f"--run.dir={tmp_path / 'run'}", "--sample.num_samples=8", "--sample.batch_size=8",
        "--sample.num_steps=3", "--train.num_minibatches=2", "--train.micro_batch=5", "--lora.rank=2", "--prompts.samples_per_prompt=1",
    ]  # fmt: skip


class Local:
    """A Worker without a process: its contender is in this one."""

    def __init__(self, name, options):
        self.name, self.contender = name, make(name, options)
        self.work = {"dtype": self.contender.config.model.dtype, "num_samples": self.contender.config.sample.num_samples}

    def call(self, method, **arguments):
        if "file" in arguments:
            arguments["file"] = harness.Path(arguments["file"])
        return getattr(self.contender, method)(**arguments) or {}

    def send(self, method):
        self.answered = self.call(method)

    def answer(self):
        return self.answered

    def iterate(self, count_flop=False):
        return self.contender.iterate(count_flop)


def local_start(stack, contenders):
    return {label: Local(name, options) for label, (name, options) in contenders.items()}


@pytest.fixture
def tiny_work(argv, monkeypatch):
    """Works on the tiny model, in this process."""
    work = models.Work("embedded", tuple(option for option in argv if not option.startswith("--model.path")))
    monkeypatch.setattr(
        contenders, "count_run", create_autospec(contenders.count_run, return_value=COUNTS)
    )  # it takes longer than all else
    monkeypatch.setattr(models, "EMBEDDED", argv[0].partition("=")[2])
    for module in (harness, peers, throughput, waterfall):
        monkeypatch.setattr(module, "start", local_start)
    return work


def broken_loss(ops, factor):
    """`ops` whose loss has a gradient `factor` times the right one."""

    def ppo_loss(*args, **kwargs):
        loss, statistics = ops.ppo_loss(*args, **kwargs)
        return loss.detach() + factor * (loss - loss.detach()), statistics

    return replace(ops, ppo_loss=ppo_loss)


def broken_step(ops):
    """`ops` whose step adds a hundredth too much noise."""

    def ddim_step(noise_pred, latents, coefficients, *args):
        wrong = coefficients.clone()
        wrong[:, 2] *= 1.01
        next_latents, _, unet_input = reference.ddim_step(noise_pred, latents, wrong, *args)
        return next_latents, ops.ddim_step(noise_pred, latents, coefficients, *args)[1], unet_input

    return replace(ops, ddim_step=ddim_step)


def test_contenders_do_the_same_work(argv):
    ours, textbook = Local("ours", [*argv, "--lora.forward=separate", "--model.share_guidance=false"]), Local("textbook", argv)
    errors = harness.gate({"ours": ours, "textbook": textbook}, textbook)
    assert errors["textbook"] == 0 and 0 < errors["ours"] < textbook.contender.loop.rounding()
    results = [worker.iterate(count_flop=True) for worker in (ours, textbook)]
    for stage in ("denoise", "decode", "update"):
        assert results[0]["flop"][stage] == results[1]["flop"][stage] > 0
    for result in results:
        assert result["transitions"] == 24 and result["ratio_error"] <= bounds.of(ours.contender.config).ratio
        assert (
            sum(result["seconds"][stage] for stage in ("encode", "denoise", "decode", "reward", "update", "optimizer")) <= result["total_s"]
        )
        assert all(seconds >= 0 for seconds in result["seconds"].values())


@pytest.fixture
def flow_argv(flow_options):
    """Flow-GRPO on a tiny Stable Diffusion 3."""
    return flow_options(
        "sd3", sample__sampler="flow_sde", sample__eta=0.7, sample__window='{"size":3,"among":3}', baseline__name="group",
        baseline__std="batch",
    )  # fmt: skip


def test_contenders_do_the_same_work_on_a_flow_model(flow_argv):
    ours, textbook = Local("ours", [*flow_argv, "--lora.forward=separate"]), Local("textbook", flow_argv)
    errors, rounding = harness.compare({"ours": ours, "textbook": textbook}, textbook)
    assert errors["textbook"]["gradient"] == 0 < errors["ours"]["gradient"] < rounding < 1e-3
    assert 0 < errors["ours"]["pictures"] < harness.TOLERANCE["pictures"] / 100
    assert 0 < errors["ours"]["advantages"] < harness.TOLERANCE["advantages"]
    results = [worker.iterate(count_flop=True) for worker in (ours, textbook)]
    for stage in ("denoise", "decode", "update"):
        assert results[0]["flop"][stage] == results[1]["flop"][stage] > 0
    for result in results:
        assert result["transitions"] == 4 * 3 and result["ratio_error"] < 1e-4


@pytest.mark.parametrize("what", ["pictures", "advantages"])
def test_other_pictures_and_other_advantages_are_refused(flow_argv, what):
    ours, textbook = Local("ours", flow_argv), Local("textbook", flow_argv)
    run = ours.contender.run
    if what == "pictures":
        ours.contender.run = replace(run, ops=broken_step(run.ops))
    else:
        run.objective.credit.baseline.std = "prompt"
    with pytest.raises(harness.GateError, match=f"ours: its {what} is off by"):
        harness.gate({"ours": ours}, textbook)


def test_gate_leaves_the_parameters_as_they_were(argv):
    textbook, ours = Local("textbook", argv), Local("ours", argv)
    before = {name: parameter.detach().clone() for name, parameter in ours.contender.trainable().items()}
    harness.gate({"ours": ours}, textbook)
    assert all(torch.equal(parameter, before[name]) for name, parameter in ours.contender.trainable().items())
    assert all(parameter.grad is None for parameter in ours.contender.trainable().values())


@pytest.mark.parametrize("factor", [0.98, -1.0])
def test_wrong_gradient_is_refused(argv, factor):
    ours, textbook = Local("ours", argv), Local("textbook", argv)
    ours.contender.run.objective.ops = broken_loss(ours.contender.run.ops, factor)
    with pytest.raises(harness.GateError, match="ours: its gradient is off by"):
        harness.gate({"ours": ours}, textbook)


def test_wrong_step_is_refused(argv):
    ours = Ours(argv)
    ours.run = replace(ours.run, ops=broken_step(ours.run.ops))
    with pytest.raises(RuntimeError, match="ratio_error"):
        ours.iterate()


@pytest.mark.parametrize("module", [waterfall, throughput, peers])
def test_benchmark_reports_nothing_of_a_broken_kernel(module, tiny_work, monkeypatch, tmp_path, capsys):
    def start(stack, contenders):
        workers = local_start(stack, contenders)
        for worker in workers.values():
            if worker.name.startswith("ours"):
                worker.contender.run.objective.ops = broken_loss(worker.contender.run.ops, 0.98)
        return workers

    monkeypatch.setattr(module, "WORKS", {"embedded": tiny_work})
    monkeypatch.setattr(module, "start", start)
    options = {waterfall: ["--only", "transition"], throughput: ["--models", "embedded"], peers: ["--peers", "textbook"]}[module]
    assert module.main([*options, "--rounds", "1", "--out", str(tmp_path)]) == 1
    assert "gradient is off" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.csv"))


def test_waterfall_writes_speed_and_quality(tiny_work, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(waterfall, "WORKS", {"embedded": tiny_work})
    uncompiled = waterfall.techniques(compiled=False)
    assert waterfall.main(["--rounds", "2", "--out", str(tmp_path)]) == 0
    rows = read("waterfall", tmp_path)
    assert [row["technique"] for row in rows][:2] == [waterfall.BASELINE, "transition batching"] and len(rows) == 1 + len(uncompiled)
    assert float(rows[0]["ratio_to_baseline"]) == 1
    bound = bounds.of(parse([*tiny_work.options, f"--model.path={models.EMBEDDED}"])).ratio
    for row in rows:
        assert float(row["ratio_error"]) <= bound and float(row["gradient_error"]) < 5e-4 and float(row["images_per_s"]) > 0
        assert row["reward_after"] and float(row["samples"]) == 24
    assert "x baseline" in capsys.readouterr().out


def test_techniques_build_on_each_other_but_not_on_alternatives():
    contenders = waterfall.contenders(models.Work("embedded", ()), waterfall.techniques())
    assert contenders["transition batching"][0] == "ours:contiguous,plain_norms"
    assert contenders["channels_last"][0] == "ours:plain_norms"
    assert "--attention.backend=math" in contenders["or math attention"][1]
    assert "--attention.backend=math" not in contenders["or 8-bit AdamW"][1]
    assert "--optimizer.name=adamw_8bit" not in contenders["or LoRA in mid and up blocks"][1]
    assert "--lora.forward=merged" in contenders["or LoRA in mid and up blocks"][1]
    assert not any("mid_up" in option or "8bit" in option for option in contenders["compiled UNet"][1])


def test_peers_pairs_rounds(tiny_work, monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "WORKS", {"embedded": tiny_work})
    assert peers.main(["--peers", "textbook", "--rounds", "3", "--no-limits", "--out", str(tmp_path)]) == 0
    rows = {(row["peer"], row["stage"]): row for row in read("peers", tmp_path)}
    total = rows["textbook", "total"]
    assert float(total["ratio_low"]) <= float(total["ours_is_faster_by"]) <= float(total["ratio_high"])
    assert rows["ours", "total"]["ours_is_faster_by"] == "" and "gradient differs" in total["note"]
    assert float(rows["ours", "total"]["peak_memory_mib"]) > 100 and float(rows["ours", "total"]["tflop_per_image"]) > 0
    assert float(total["images_per_s"]) == pytest.approx(8 / float(total["median_s"]), rel=1e-3)


def test_peers_without_trl_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TRL_PY", "no/such/python")
    with pytest.raises(SystemExit) as stop:
        peers.main(["--peers", "trl", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "TRL_PY=no/such/python: it has no TRL" in capsys.readouterr().err


def test_interrupted_turns_count_whole_rounds(capsys):
    class Fake:
        def __init__(self, name, iterations):
            self.name, self.iterations = name, iterations

        def iterate(self):
            self.iterations -= 1
            if self.iterations < 0:
                raise KeyboardInterrupt if self.name == "A" else RuntimeError("B: it broke")
            return {}

    assert harness.take_turns({"A": Fake("A", 2), "B": Fake("B", 9)}, 5) == {"A": [{}] * 2, "B": [{}] * 2}
    with pytest.raises(KeyboardInterrupt):
        harness.take_turns({"B": Fake("B", 9), "A": Fake("A", 0)}, 5)
    assert harness.take_turns({"A": Fake("A", 9), "B": Fake("B", 1)}, 3) == {"A": [{}] * 3}
    assert "left out: B: it broke" in capsys.readouterr().err


def test_a_technique_that_fails_is_left_out_and_the_others_are_measured(tiny_work, monkeypatch, tmp_path, capsys):
    def start(stack, contenders):
        workers = local_start(stack, contenders)
        if "channels_last" in workers:

            def fail():
                raise RuntimeError("ours: no kernel for this")

            workers["channels_last"].contender.work = fail
        return workers

    monkeypatch.setattr(waterfall, "WORKS", {"embedded": tiny_work})
    monkeypatch.setattr(waterfall, "start", start)
    assert waterfall.main(["--only", "channels_last", "merged", "--rounds", "1", "--out", str(tmp_path)]) == 1
    assert "left out: ours: no kernel for this" in capsys.readouterr().err
    assert [row["technique"] for row in read("waterfall", tmp_path)] == [waterfall.BASELINE, "transition batching", "merged LoRA"]


def test_broken_attention_is_refused(argv, monkeypatch):
    ours, textbook = Local("ours", [*argv, "--attention.backend=math"]), Local("textbook", argv)
    scaled = torch.nn.functional.scaled_dot_product_attention

    def backend_is_math() -> bool:
        return not torch.backends.cuda.flash_sdp_enabled()

    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: scaled(*a, **k) * (1.1 if backend_is_math() else 1.0)
    )
    with pytest.raises(harness.GateError, match="math attention"):
        harness.gate({"math attention": ours}, textbook)


@pytest.mark.parametrize(
    "option",
    ["--optimizer.name=adamw_8bit", "--sample.eta=0.5", "--train.timestep_fraction=0.5", "--sample.window={'size': 2}"],
)
def test_contender_refuses_what_it_does_not_have(argv, option):
    with pytest.raises(ValueError, match=f"{option[2:]}: this contender has"):
        Textbook([*argv, option])


def test_stages_split_what_contains_others():
    stages = Stages(torch.device("cpu"))
    stages.seconds = {"sample": 5.0, "encode": 1.0, "decode": 0.5, "train": 4.0, "optimizer": 1.0, "reward": 0.25, "total": 10.0}
    seconds, _ = stages.split()
    assert seconds == {"encode": 1.0, "denoise": 3.5, "decode": 0.5, "reward": 0.25, "update": 3.0, "optimizer": 1.0, "total": 10.0}


def test_resize_changes_the_work_and_checks_it(argv):
    ours = Ours(argv)
    ours.resize(sample__num_samples=4, sample__num_steps=2, train__inner_epochs=2)
    assert ours.iterate()["transitions"] == 4 * 2 * 2
    ours.resize(sample__num_steps=5)
    assert ours.iterate()["transitions"] == 4 * 5 * 2
    with pytest.raises(ValueError, match="sample.num_samples=3"):
        ours.resize(sample__num_samples=3)


def test_worker_is_a_process_that_reports_its_failure(argv):
    with harness.Worker("ours", argv) as worker:
        assert worker.iterate()["reward_mean"] < 0
        with pytest.raises(RuntimeError, match="ours: ValueError: sample.num_samples=3"):
            worker.call("resize", sample__num_samples=3)
    with harness.Worker("ours", ["--model.path=nowhere"]) as worker, pytest.raises(RuntimeError, match="model.path=.*nowhere: valid is"):
        worker.wait()


def test_turns_alternate():
    order = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def iterate(self):
            order.append(self.name)
            return {}

    harness.take_turns({name: Fake(name) for name in "AB"}, 3)
    assert "".join(order) == "ABBAAB"


def test_a_round_that_would_not_end_in_time_is_not_begun(monkeypatch, capsys):
    now = [100.0]

    class Fake:
        def iterate(self):
            now[0] += 10
            return {}

    monkeypatch.setattr(harness.time, "time", lambda: now[0])
    assert harness.take_turns({"A": Fake(), "B": Fake()}, 5, deadline=165.0) == {"A": [{}] * 3, "B": [{}] * 3}
    assert "3 of 5 rounds: there is no time for more" in capsys.readouterr().err
    assert harness.take_turns({"A": Fake()}, 5, deadline=0.0) == {"A": [{}]}


def test_an_interrupted_worker_does_not_finish_what_it_does(monkeypatch):
    popen = harness.subprocess.Popen
    deaf = "import time; time.sleep(600)"
    monkeypatch.setattr(harness.subprocess, "Popen", lambda command, **kwargs: popen([command[0], "-c", deaf], **kwargs))
    with pytest.raises(KeyboardInterrupt), harness.Worker("ours", []) as worker:
        raise KeyboardInterrupt
    assert worker.process.returncode == -9


def test_random_pipelines_have_the_named_architecture(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "ROOT", tmp_path)
    folder = models.random_pipeline("sd15_small")
    assert folder == models.random_pipeline("sd15_small")
    textbook = Textbook([f"--model.path={folder}", "--sample.num_samples=4", "--lora.targets=[attention]"])
    blocks = [type(block).__name__ for block in textbook.network.down_blocks]
    assert blocks == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]


def test_scaling_rows(tiny_work, monkeypatch, tmp_path):
    @contextmanager
    def local(name, options):
        yield type("", (Local,), {"wait": lambda self: None})(name, options)

    monkeypatch.setattr(throughput, "Worker", local)
    monkeypatch.setattr(throughput, "VALUES", {"cpu": {"batch": (2, 4), "steps": (2, 3)}})
    monkeypatch.setitem(throughput.START["cpu"], "sample__num_samples", 4)
    monkeypatch.setattr(throughput, "rank_times", lambda *_: {})
    rows = throughput.scaling(tiny_work, 1, Writer("scaling", tmp_path, ["test"]))
    assert [(row["axis"], row["value"]) for row in rows] == [("batch", "2"), ("batch", "4"), ("steps", "2"), ("steps", "3")]
    assert all(float(row["median_s"]) > 0 for row in rows)


@pytest.mark.parametrize("name, rows", [("sd3", 2), ("flux", 1)])
def test_a_prediction_has_the_rows_and_steps_of_the_recording(flow_options, monkeypatch, name, rows):
    """FLUX is told its guidance in one row, and the last step of cps has no density."""
    monkeypatch.setattr(predict, "measure_link", lambda num_bytes: (1e9, 1e-5))
    monkeypatch.setattr(predict, "REPEATS", 1)
    monkeypatch.setattr(predict.torch, "set_num_threads", lambda threads: None)
    work, costs = predict.calibrate(parse(flow_options(name, sample__num_steps=5)))
    assert (work.rows, work.trained_rows, work.trained_steps) == (rows, rows, 4)
    assert costs.sample_row_s + costs.sample_call_s > 0 and costs.update_row_s + costs.update_call_s > 0


def test_ranks_share_the_work(tiny_work):
    base = {"sample__num_samples": 4, "sample__batch_size": 4, "sample__num_steps": 2, "train__num_minibatches": 1, "train__micro_batch": 8}
    times = throughput.rank_times(tiny_work, base, 1)
    assert list(times) == [1, 2] and all(turns[0]["transitions"] == 8 for turns in times.values())
