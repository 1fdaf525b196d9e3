"""report.html from run directories written by hand: what is on the page, whose pictures, what it costs nobody to look at."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ddpo_fast.records import report
from ddpo_fast.records.metrics import diversity, image_grid, save_grid

NULLS = (
    "iteration samples reward_mean reward_std eval_reward_mean eval_reward_std eval_samples eval_diversity ratio_error clip_fraction "
    "approx_kl grad_norm images_per_s transitions_per_s time_sample_s time_reward_s time_train_s time_eval_s time_total_s device_hours "
    "peak_memory_mib cache_hit_fraction bad_rewards"
).split()
COLOURS = [(255, 0, 0), (0, 160, 0), (0, 0, 255), (255, 200, 0), (255, 0, 255), (0, 200, 200), (90, 90, 90), (130, 60, 0), (0, 0, 0)]


class Page(HTMLParser):
    """Tags, with their attributes, and text, in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.text, self.source = [], [], path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def make_run(folder: Path, *, reward=(1.0, 1.5, 3.0), prompts=("<a> & b", "c"), seed=0, rate=1e-3, name="redness", **extra) -> Path:
    """A run of an iteration for each reward after the first; picture i has COLOURS[i] before, COLOURS[i + 1] now."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i, mean in enumerate(reward):
        row = dict.fromkeys(NULLS) | {"iteration": i, "samples": 8 * i, "device_hours": 0.5 * i, "bad_rewards": 0, "peak_memory_mib": 9.5}
        row |= {"eval_reward_mean": mean, "eval_reward_std": 0.4, "eval_samples": 4, "eval_diversity": 0.25}
        if i:
            row |= {"reward_mean": mean - 0.1, "reward_std": 1.0, "ratio_error": i * 1e-7, "clip_fraction": 0.5, "approx_kl": 0.1}
            row |= {"images_per_s": 2.0, "transitions_per_s": 4.0, "cache_hit_fraction": 0.25, "time_sample_s": 1.0, "time_reward_s": 0.5}
            row |= {"time_train_s": 2.0, "time_eval_s": 0.25, "time_total_s": 4.0, **extra}
        rows.append(json.dumps(row) + "\n")
    (folder / "metrics.jsonl").write_text("".join(rows))
    config = {
        "model": {"path": "m"}, "reward": {"name": name}, "run": {"seed": seed, "dir": str(folder)}, "train": {"learning_rate": rate},
        "sample": {"num_steps": 5, "guidance_scale": 3.0, "eta": 1.0},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for iteration, first in ((0, 0), (len(reward) - 1, 1)):
        pictures = torch.tensor([COLOURS[(i + first) % len(COLOURS)] for i in range(len(prompts))], dtype=torch.uint8)
        pictures = pictures[:, :, None, None].expand(-1, -1, 8, 8)
        grid = image_grid(pictures, list(prompts), torch.arange(len(prompts)) + 10.0 * first)
        save_grid(grid, folder / "images" / f"iteration_{iteration:05d}.png")
    return folder


def shown(page: Page) -> list[tuple[str, tuple[int, int, int]]]:
    """What the page says about each picture and the colour in its middle, by the rules of CSS backgrounds."""
    rules = re.findall(
        r"\.(\w+) \{ background-image: url\(data:image/jpeg;base64,([^)]*)\); background-size: ([\d.]+)% ([\d.]+)% \}", page.source
    )
    grids = {name: (Image.open(io.BytesIO(base64.b64decode(data))), float(x), float(y)) for name, data, x, y in rules}
    result = []
    for tag, attributes in page.tags:
        if tag == "i":
            image, wide, high = grids[attributes["class"]]
            box = image.width * 100 / wide, image.height * 100 / high  # the window, in the grid's pixels
            assert box == pytest.approx((128, 128), abs=0.01)
            at = re.fullmatch(r"background-position: ([\d.]+)% ([\d.]+)%", attributes["style"])
            left, top = ((size - window) * float(percent) / 100 for size, window, percent in zip(image.size, box, at.groups()))
            result.append((attributes["aria-label"], image.getpixel((round(left + 64), round(top + 64)))))
    return result


def near(colour, expected) -> bool:
    return max(abs(a - b) for a, b in zip(colour, expected)) <= 4  # JPEG


def test_page_of_a_run(tmp_path):
    page = Page(report.write_report(make_run(tmp_path / "run")))
    text = " ".join(" ".join(page.text).split())
    assert "Evaluation reward 1 → 3 in 2 iterations, 16 samples, 1 device-hours." in text
    error = math.sqrt(2 * 0.4**2 / 4)
    for value, name in (
        ("+200.0 %", "change of the evaluation reward"),
        (f"{2 / error:+.1f}", "the same in standard errors"),
        ("2e-07", "largest ratio_error"),
    ):
        assert f"{value} {name}" in text
    assert "25 % read from the cache" in text
    assert (
        "sample 2.0 1.00 25.0 % reward 1.0 0.50 12.5 % train 4.0 2.00 50.0 % eval 0.5 0.25 6.2 % rest 0.5 0.25 6.2 % total 8.0 4.00" in text
    )
    assert "learning_rate: 0.001" in text and "not recorded" in text
    assert sum(tag == "img" for tag, _ in page.tags) == 3 + 3 + 1


def test_page_asks_for_nothing_and_runs_nothing(tmp_path):
    page = Page(report.write_report(make_run(tmp_path / "run")))
    assert not {"script", "iframe", "form"} & {tag for tag, _ in page.tags}
    addresses = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    addresses += re.findall(r"url\(([^)]*)\)", page.source)
    assert len(addresses) > 8 and all(address.startswith("data:") for address in addresses)
    assert any(attributes.get("name") == "viewport" for _, attributes in page.tags)


def test_pictures_are_those_of_their_prompts_before_and_now(tmp_path):
    """16 pictures, two lines of the grid; a prompt is text, whatever is in it."""
    prompts = ["<a> & b", "<script>x</script>", *(f"prompt {i}" for i in range(14))]
    page = Page(report.write_report(make_run(tmp_path / "run", prompts=prompts)))
    pictures = shown(page)
    assert len(pictures) == 32
    for i, prompt in enumerate(prompts):
        (before, colour), (now, after) = pictures[2 * i : 2 * i + 2]
        assert before == f"{prompt}, iteration 0: {i:.3f}" and near(colour, COLOURS[i % 9])
        assert now == f"{prompt}, iteration 2: {i + 10:.3f}" and near(after, COLOURS[(i + 1) % 9])
    assert sum(tag == "details" for tag, _ in page.tags) == 4 and "4 more" in page.text


def test_other_evaluations_are_curves_of_their_own(tmp_path):
    run = report.read_run(make_run(tmp_path / "run", heldout_reward_mean=2.0, heldout_reward_std=0.1, heldout_samples=4))
    assert run.evaluation_names == ["eval", "heldout"] and len(run.evaluations("heldout")) == 2
    svg = base64.b64decode(re.search(r"svg\+xml;base64,([^\"]*)", report._rewards([run])[0])[1]).decode()
    assert "fixed evaluation ± s.e." in svg and "held-out evaluation ± s.e." in svg and "training samples" in svg


def test_comparison(tmp_path):
    """Two of one reward with the same evaluation, one with another seed, and one of another reward."""
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", rate=1e-2, reward=(1.0, 4.0))]
    runs += [make_run(tmp_path / "other seed", seed=1), make_run(tmp_path / "deep" / "one", name="blueness")]
    page = Page(report.write_comparison(runs, tmp_path / "page.html"))
    text = " ".join(" ".join(page.text).split())
    assert "Reward: redness" in text and "Reward: blueness" in text
    assert f"{tmp_path / 'one'} 1 3 +200.0 %" in text and "two 1 4 +300.0 % +10.6 8 0.5 2 4 1e-07 0.5 9.5" in text
    assert "train.learning_rate 0.001 0.01 0.001 0.001" in text and "run.seed 0 0 1 0" in text and "run.dir" not in text
    labels = [label for label, _ in shown(page)]
    assert labels[:3] == ["<a> & b, iteration 0: 0.000", f"<a> & b, {tmp_path / 'one'}: 10.000", "<a> & b, two: 10.000"]
    assert len(labels) == 2 * (3 + 2 + 2) and all(
        near(*pair) for pair in zip([c for _, c in shown(page)][:3], [COLOURS[i] for i in (0, 1, 1)])
    )


def test_comparison_names_the_evaluations(tmp_path):
    held_out = {"heldout_reward_mean": 2.0, "heldout_reward_std": 0.1, "heldout_samples": 4}
    page = Page(report.write_comparison([make_run(tmp_path / "one", **held_out), make_run(tmp_path / "two")], tmp_path / "page.html"))
    text = " ".join(" ".join(page.text).split())
    assert "run fixed evaluation: before after change standard errors held-out evaluation: before after change" in text


def test_pictures_that_were_made_in_another_way_are_not_beside_each_other(tmp_path):
    """The options of the evaluation count, and not those of the samples, where it has its own."""
    runs = [make_run(tmp_path / name) for name in ("one", "two", "three")]
    for run, sampled, evaluated in zip(runs, (5, 9, 9), (None, 5, None)):
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["sample"]["num_steps"] = sampled
        config["eval"] = {"num_steps": evaluated, "sampler": None, "guidance_scale": None}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    labels = [label for label, _ in shown(Page(report.write_comparison(runs, tmp_path / "page.html")))]
    assert labels[:3] == ["<a> & b, iteration 0: 0.000", "<a> & b, one: 10.000", "<a> & b, two: 10.000"]
    assert len(labels) == 2 * (3 + 2)


def test_command_line(tmp_path, capsys, monkeypatch):
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    report.main([str(one)])
    report.main([str(one), str(two)])
    report.main([str(one), str(two), "--output", "both.html"])
    assert capsys.readouterr().out.split() == [str(one / "report.html"), "comparison.html", "both.html"]
    (two / "metrics.jsonl").unlink()
    for argv, message in (
        ([str(tmp_path / "none")], f"RUN_DIR={tmp_path / 'none'}: there is no config.yaml in it; valid is the directory of a run"),
        ([str(one), str(two)], f"RUN_DIR={two}: there is no metrics.jsonl in it; valid is the directory of a run"),
        ([str(one), "--output=x.html"], "--output=x.html: valid with several runs; the page of one is RUN_DIR/report.html"),
    ):
        with pytest.raises(SystemExit, match="2"):
            report.main(argv)
        assert capsys.readouterr().err == f"error: {message}\n"
    (one / "config.yaml").write_text("model: {path: [")
    with pytest.raises(SystemExit, match="2"):
        report.main([str(one)])
    said = capsys.readouterr().err
    assert said.startswith(f"error: RUN_DIR={one}: its config.yaml is damaged: ") and said.count("\n") == 1


def test_the_kl_penalty_is_watched_where_there_is_one(tmp_path):
    pages = [
        Page(report.write_report(make_run(tmp_path / name, **extra)))
        for name, extra in (("without", {}), ("with", {"kl_to_reference": 0.5}))
    ]
    alts = [[attributes["alt"] for tag, attributes in page.tags if tag == "img"] for page in pages]
    assert set(alts[1]) - set(alts[0]) == {"kl_to_reference"} and "approx_kl" in alts[0]


def test_run_that_has_only_begun(tmp_path):
    folder = make_run(tmp_path / "run", reward=(1.0,))
    assert "Evaluation reward <b>1</b> → <b>1</b> in 0 iterations" in report.write_report(folder).read_text()
    (folder / "metrics.jsonl").write_text("")
    for path in (folder / "images").iterdir():
        path.unlink()
    assert "Nothing has been evaluated yet." in report.write_report(folder).read_text()


def test_nothing_finite(tmp_path):
    """Null, as metrics.jsonl has what is not finite, is a gap, and a reward that failed is said to have."""
    folder = make_run(tmp_path / "run", grad_norm=None, clip_fraction=None)
    grid = image_grid(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["a", "b"], torch.tensor([torch.nan, 1.0]))
    save_grid(grid, folder / "images" / "iteration_00002.png")
    assert [label for label, _ in shown(Page(report.write_report(folder)))][1] == "<a> & b, iteration 2: no reward"


def test_a_picture_that_cannot_be_read_is_not_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    whole = (folder / "images" / "iteration_00002.png").read_bytes()
    for damaged in (b"", whole[:20], whole[: len(whole) // 2]):
        (folder / "images" / "iteration_00003.png").write_bytes(damaged)
        page = Page(report.write_report(folder))
        assert not shown(page) and "Evaluation reward 1 → 3" in " ".join(" ".join(page.text).split())


def test_diversity_is_the_mean_distance_of_pairs():
    images = torch.randint(0, 256, (5, 3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small = images.numpy().astype(float) / 255
    columns = np.stack([small[..., i * 48 // 32 : -(-(i + 1) * 48 // 32)].mean(-1) for i in range(32)], -1)
    small = columns.reshape(5, 3, 32, 2, 32).mean(3)
    distances = [math.sqrt(((small[i] - small[j]) ** 2).mean()) for i in range(5) for j in range(i)]
    assert diversity(images) == pytest.approx(sum(distances) / 10, rel=1e-5)
    assert diversity(images[:1].repeat(4, 1, 1, 1)) == 0 and diversity(images[:1]) is None
    assert diversity(torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 8, 8)) == pytest.approx(1)
