"""Result files, the comparison of runs, and what README.md shows of them."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GPU, CPU = "NVIDIA H200", "Some CPU (2 threads)"


@pytest.fixture
def bench(monkeypatch):
    """The modules; rows of an invented machine."""
    monkeypatch.syspath_prepend(ROOT)
    from bench import compare, headline, rows

    monkeypatch.setattr(rows, "commit", lambda: "abc1234")
    monkeypatch.setattr(rows, "device_name", lambda: CPU)
    bench = type("Bench", (), dict(compare=compare, headline=headline, rows=rows))

    def add(folder: Path, table: str, *rows_of_a_run: dict, day: int = 1, command: str = "python -m bench.x", **environment):
        writer = rows.Writer(table, folder, command.split())
        for row in rows_of_a_run:
            writer.add(**row | environment | {"date": f"2026-01-{day:02}T10:00:00+00:00"})

    bench.add = staticmethod(add)
    return bench


def kernel(op: str, us: float | None, low: float | None = None, high: float | None = None) -> dict:
    return dict(op=op, direction="forward", provider="eager", shape="8", dtype="float32", p50_us=us, p20_us=low, p80_us=high)


# rows.py


def test_rows_are_read_as_they_were_written(bench, tmp_path):
    writer = bench.rows.Writer("kernels", tmp_path / "new", ["python", "-m", "bench.kernels", "-k", "a or b"])
    written = [writer.add(op="a", p50_us=1234.567, p20_us=127712.3, p80_us=1.5e-7, bytes=12345678), writer.add(op="b", p50_us=None)]
    assert bench.rows.read("kernels", tmp_path / "new") == written
    first, second = written
    assert (first["p50_us"], first["p20_us"], first["p80_us"], first["bytes"]) == ("1234.6", "127710", "1.5e-07", "12345678")
    assert second["p50_us"] == second["layout"] == ""
    assert first["command"] == "python -m bench.kernels -k 'a or b'" and first["device"] == CPU and first["commit"] == "abc1234"
    assert all(first[name] for name in bench.rows.ENVIRONMENT) and first["date"].endswith("+00:00")
    assert list(first) == bench.rows.TABLES["kernels"].columns and first["date"] == second["date"]


def test_there_may_be_no_file(bench, tmp_path):
    assert bench.rows.read("peers", tmp_path) == []


@pytest.mark.parametrize(
    "row, message", [(dict(ops="a"), "no column ops"), (dict(p50_us=float("nan")), "p50_us=nan"), (dict(p80_us="x"), "x")]
)
def test_a_row_that_does_not_fit_is_refused(bench, tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        bench.rows.Writer("kernels", tmp_path, []).add(**row)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: ["op,p50_us", "a,1"], "its columns are not those of the table kernels"),
        (lambda lines: [], "its columns are not"),
        (lambda lines: [*lines, "a,b"], "line 3: 2 cells"),
        (lambda lines: [*lines, lines[1].replace(",10,", ",ten,")], "line 3: .*ten"),
    ],
)
def test_another_file_is_refused(bench, tmp_path, change, message):
    bench.add(tmp_path, "kernels", kernel("a", 10.0))
    path = tmp_path / "kernels.csv"
    path.write_text("\n".join(change(path.read_text().splitlines())))
    before = path.read_text()
    with pytest.raises(ValueError, match=message):
        bench.rows.read("kernels", tmp_path)
    with pytest.raises(ValueError, match=message):
        bench.rows.Writer("kernels", tmp_path, [])
    assert path.read_text() == before


def test_runs_are_by_date(bench, tmp_path):
    bench.add(tmp_path, "kernels", kernel("c", 1.0), day=3)
    bench.add(tmp_path, "kernels", kernel("a", 1.0), kernel("b", 1.0), day=1)
    bench.add(tmp_path, "kernels", kernel("g", 1.0), day=2, device=GPU)
    rows = bench.rows.read("kernels", tmp_path)
    assert [[row["op"] for row in run] for run in bench.rows.runs(rows)] == [["a", "b"], ["g"], ["c"]]
    assert [[row["op"] for row in run] for run in bench.rows.runs(rows, CPU)] == [["a", "b"], ["c"]]


def test_the_commit_tells_changed_source(bench, tmp_path, monkeypatch):
    monkeypatch.undo()
    bench.rows.commit.cache_clear()
    if not (ROOT / ".git").exists():
        pytest.skip("a copy without git")
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    commit, _, changed = bench.rows.commit().partition("-dirty-")
    assert commit == head.stdout.strip() and changed in ("", bench.rows.fingerprint(ROOT))


def test_committed_rows_can_be_read(bench):
    rows = {table: bench.rows.read(table) for table in bench.rows.TABLES}
    assert rows["kernels"]


# compare.py


@pytest.mark.parametrize(
    "table, old, new, expected",
    [
        ("kernels", (100.0, 98.0, 102.0), (120.0, 118.0, 122.0), "worse"),
        ("kernels", (100.0, 98.0, 102.0), (80.0, 78.0, 82.0), "better"),
        ("kernels", (100.0, 90.0, 110.0), (120.0, 109.0, 122.0), "same"),
        ("kernels", (100.0, 90.0, 110.0), (80.0, 75.0, 90.0), "same"),
        ("kernels", (100.0, 99.9, 100.1), (104.0, 103.9, 104.1), "same"),
        ("kernels", (100.0, None, None), (106.0, None, None), "worse"),
        ("kernels", (100.0, None, None), (None, None, None), "worse"),
        ("kernels", (None, None, None), (100.0, None, None), "better"),
        ("kernels", (None, None, None), (None, None, None), "same"),
        ("waterfall", (100.0, 98.0, 102.0), (80.0, 78.0, 82.0), "worse"),
        ("waterfall", (100.0, 98.0, 102.0), (120.0, 118.0, 122.0), "better"),
    ],
)
def test_a_change_counts_beyond_noise(bench, tmp_path, capsys, table, old, new, expected):
    for day, values in enumerate((old, new), 1):
        columns = bench.rows.TABLES[table]
        bench.add(tmp_path, table, dict(zip((columns.metric, columns.low, columns.high), values)), day=day)
    assert bench.compare.main(["--results", str(tmp_path), "--table", table]) == (expected == "worse")
    out = capsys.readouterr().out
    assert out.splitlines()[1].endswith(expected)
    assert ("REGRESSIONS" in out) == (expected == "worse")


def test_others_getting_slower_is_no_regression(bench, tmp_path):
    for day, seconds in enumerate((1.0, 2.0), 1):
        bench.add(tmp_path, "peers", *(dict(peer=peer, stage="total", median_s=seconds) for peer in ("trl", "textbook")), day=day)
        bench.add(tmp_path, "waterfall", dict(technique="textbook loop", images_per_s=1 / seconds), day=day)
    assert bench.compare.main(["--results", str(tmp_path)]) == 0
    for day, seconds in enumerate((1.0, 2.0), 3):
        bench.add(tmp_path, "peers", dict(peer="ours", stage="total", median_s=seconds), day=day)
    assert bench.compare.main(["--results", str(tmp_path)]) == 1


def test_regressions_come_last(bench, tmp_path, capsys):
    bench.add(tmp_path, "kernels", kernel("slower", 100.0), kernel("same", 1.0))
    bench.add(tmp_path, "kernels", kernel("slower", 150.0), kernel("same", 1.0), day=2, torch="9.9")
    assert bench.compare.main(["--results", str(tmp_path)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert "slower" in out[-1] and "+50.0 %" in out[-1] and out[-2] == f"REGRESSIONS: kernels on {CPU}"
    assert "torch" in out[0] and "-> 9.9" in out[0] and "2026-01-01T10:00:00 (abc1234) -> 2026-01-02T10:00:00 (abc1234)" in out[0]
    assert "peers: no rows" in out


def test_gone_and_new_are_told_and_a_partial_run_is_compared(bench, tmp_path, capsys):
    bench.add(tmp_path, "kernels", kernel("a", 100.0), kernel("b", 100.0), kernel("lost", 5.0))
    bench.add(tmp_path, "kernels", kernel("b", 100.0), kernel("lost", 5.0), day=2)
    bench.add(tmp_path, "kernels", kernel("a", 50.0), kernel("added", 1.0), day=3)
    assert bench.compare.main(["--results", str(tmp_path), "--table", "kernels"]) == 0
    verdicts = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert verdicts == {"a": "better", "added": "new", "b": "gone", "lost": "gone"}


def test_machine_kinds_are_apart(bench, tmp_path, capsys):
    bench.add(tmp_path, "kernels", kernel("a", 100.0))
    bench.add(tmp_path, "kernels", kernel("a", 1.0), day=2, device=GPU)
    assert bench.compare.main(["--results", str(tmp_path), "--table", "kernels"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"kernels on {CPU}: only one run", f"kernels on {GPU}: only one run", "no regressions"
    ]  # fmt: skip
    bench.add(tmp_path, "kernels", kernel("a", 2.0), day=3, device=GPU)
    assert bench.compare.main(["--results", str(tmp_path), "--table", "kernels"]) == 1


@pytest.mark.parametrize(
    "against, status", [("abc", 0), ("def5678", 1), ("def56789abcd", 1), ("2026-01-01", 0), ("2026-01-02", 1), (None, 1)]
)
def test_against_chooses_the_run(bench, tmp_path, against, status):
    bench.add(tmp_path, "kernels", kernel("a", 100.0))
    bench.add(tmp_path, "kernels", kernel("a", 50.0), day=2, commit="1111111+def5678-dirty-12ab34cd")
    bench.add(tmp_path, "kernels", kernel("a", 100.0), day=3, commit="9999999")
    assert bench.compare.main(["--results", str(tmp_path), *(["--against", against] if against else [])]) == status


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--table", "peer"], "--table peer: valid is kernels, "),
        (["--results", "nowhere"], "--results nowhere: there is no such folder"),
        (["--against", "9999999"], "--against 9999999: no run before"),
    ],
)
def test_bad_input_is_one_line(bench, tmp_path, capsys, argv, message):
    bench.add(tmp_path, "kernels", kernel("a", 100.0), commit="9999999")
    assert bench.compare.main(["--results", str(tmp_path), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench.compare: {message}") and error.count("\n") == 1


# headline.py


def measured(bench, folder: Path) -> None:
    """Rows of every section."""
    peers = dict(model="embedded", work="48 pictures")
    faster = dict(ours_is_faster_by=2.5, ratio_low=2.41, ratio_high=2.594)
    stages = [dict(stage="total", median_s=20.0, images_per_s=2.4), dict(stage="denoise", median_s=8.0)]
    slower = [dict(stage="total", median_s=50.0, images_per_s=0.96) | faster, dict(stage="denoise", median_s=20.0) | faster]
    missing = dict(peer="trl", stage="SDXL", note="ValueError: no\n  such `unet` | " + "x" * 20)
    rows = [*(stage | {"peer": "ours"} for stage in stages), *(stage | {"peer": "textbook"} for stage in slower), missing]
    bench.add(folder, "peers", *(peers | row for row in rows), command="python -m bench.peers --rounds 5")
    bench.add(folder, "peers", *(peers | row for row in rows[:2]), device=GPU)
    steps = ("textbook loop", 1.0), ("cache", 2.0), ("or recomputation", 1.5), ("not run", None)
    waterfall = [
        dict(technique=name, images_per_s=speed, low=speed and 0.9 * speed, high=speed and 1.1 * speed, ratio_to_baseline=speed,
             gradient_error=1.23e-6, samples=336, reward_before=-2.487, reward_after=-1.523)
        for name, speed in steps
    ]  # fmt: skip
    bench.add(folder, "waterfall", *(peers | row for row in waterfall))
    scaling = [dict(axis="batch", value=value, median_s=0.5 * value, low_s=0.4 * value, high_s=0.6 * value) for value in (16, 4, 8)]
    bench.add(folder, "scaling", *(peers | row for row in scaling))
    bench.add(folder, "scaling", peers | dict(axis="ranks", value=1, median_s=3.0), day=2)
    reward = dict(
        comparison="compressibility", setting="trl", hours_to_target=0.11, hours_low=0.1, hours_high=0.12, target=-2.0, reached="5 of 5"
    )
    bench.add(folder, "reward", reward | dict(reward_per_hour=8.182, samples=1336))
    ends = dict(
        eval_before=0.5,
        eval_after=0.75,
        eval_low=0.7,
        eval_high=0.8,
        heldout_before=0.25,
        heldout_after=0.3,
        eval_diversity=0.125,
        heldout_diversity=0.5,
    )
    for task in ("alignment", "compressibility"):
        bench.add(folder, "algorithms", *(ends | dict(task=task, algorithm=name, queries=768) for name in ("DDPO_IS", "RWR")))


PAGES = ("README.md", "docs/performance.md", "docs/algorithms.md")


@pytest.fixture
def readme(tmp_path):
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        (tmp_path / page).write_text("# Title\n\nbefore\n\n<!-- bench:begin -->\nold\n<!-- bench:end -->\n\nafter\n")
    return tmp_path / "README.md"


def headline(bench, readme: Path, *argv: str) -> int:
    return bench.headline.main(["--results", str(readme.parent), "--root", str(readme.parent), *argv])


def text(readme: Path) -> str:
    return "".join((readme.parent / page).read_text() for page in PAGES)


@pytest.mark.parametrize(
    "expected",
    [
        "before\n\n<!-- bench:begin -->\n![images per second, one technique a row](docs/waterfall.png)\n\nA row adds",
        "are too short to show learning.\n\n### NVIDIA H200\n\n**Against",
        "|  | ours | textbook loop | textbook loop / ours |\n| --- | --: | --: | --: |\n"
        "| **images/s** | 2.40 | 0.960 | 2.50x (2.41 to 2.59) |\n| denoise, s | 8.00 | 20.0 | 2.50x (2.41 to 2.59) |\n",
        "|  | ours |\n| --- | --: |\n| **images/s** | 2.40 |\n",
        "- TRL, SDXL: `ValueError: no such 'unet' | xxxxxxxxxxxxxxxxxxxx`\n",
        f"<sub>2026-01-01, {CPU}, commit abc1234: `python -m bench.peers --rounds 5`</sub>",
        "|  | images/s | over the first | gradient error | reward, 336 samples |\n| --- | --: | --: | --: | --: |\n"
        "| textbook loop | 1.00 (0.900 to 1.10) | 1.00x | 1.2e-06 | -2.49 -> -1.52 |\n",
        "| *or recomputation* | 1.50 (1.35 to 1.65) | 1.50x | 1.2e-06 | -2.49 -> -1.52 |\n| not run | - |  |",
        "| batch | 4: 2.00, 8: 4.00, 16: 8.00 | 1.00 |\n| ranks | 1: 3.00 |  |\n",
        "commit abc1234: `python -m bench.x`</sub><br><sub>2026-01-02, ",
        "| TRL | 8.18 | 0.110 (0.100 to 0.120) | -2 | 5 of 5 | - | 1,336 |\n",
        "before\n\n<!-- bench:begin -->\n![seconds an iteration along each axis](scaling.png)\n\n### ",
        "| **alignment** | DDPO_IS | 0.500 | 0.750 (0.700 to 0.800) | 0.250 | 0.300 | 0.12x | 0.50x | 768 |\n|  | RWR | 0.500 |",
        "![reward against reward queries, by algorithm](algorithms.png)",
    ],
)
def test_the_rows_become_markdown(bench, readme, monkeypatch, expected):
    measured(bench, readme.parent)
    monkeypatch.setattr(bench.headline, "PICTURES", {})
    assert headline(bench, readme) == 0
    assert expected in text(readme)


def test_every_peer_has_a_name(bench, readme):
    for peer in bench.rows.PEERS:
        bench.add(readme.parent, "peers", dict(model="m", work="w", peer=peer, stage="total", median_s=1.0, images_per_s=1.0, note="n"))
    assert headline(bench, readme) == 0
    assert "| ours | textbook loop | textbook loop, Flow-GRPO's batches | TRL | TRL, its example's batches |" in readme.read_text()
    assert "`n`" not in readme.read_text() and "The textbook loop is Flow-GRPO's." in readme.read_text()


def test_what_has_no_rows_is_left_out(bench, readme):
    assert headline(bench, readme) == 0
    assert readme.read_text() == "# Title\n\nbefore\n\n<!-- bench:begin -->\n<!-- bench:end -->\n\nafter\n"
    bench.add(readme.parent, "reward", dict(comparison="r", setting="ours", reward_per_hour=1.0))
    assert headline(bench, readme) == 0
    assert text(readme).count("**") == 2 and text(readme).count("png") == text(readme).count("](reward_r.png") == 1
    assert not list((readme.parent / "docs").glob("*.png"))


def test_the_last_run_counts(bench, readme):
    for day, speed in ((2, 4.0), (1, 1.0)):
        bench.add(readme.parent, "peers", dict(peer="ours", stage="total", median_s=1.0, images_per_s=speed), day=day)
    assert headline(bench, readme) == 0
    assert "| **images/s** | 4.00 |" in readme.read_text() and "2026-01-02" in readme.read_text()


def test_check_finds_an_edited_number_and_an_old_picture(bench, readme, capsys):
    measured(bench, readme.parent)
    assert headline(bench, readme, "--check") == 1
    assert not list((readme.parent / "docs").glob("*.png"))
    assert headline(bench, readme) == 0
    capsys.readouterr()
    assert headline(bench, readme, "--check") == 0 and capsys.readouterr().out == ""
    right = readme.read_text()
    readme.write_text(right.replace("| 2.40 | 0.960 |", "| 3.40 | 0.960 |"))
    assert headline(bench, readme, "--check") == 1
    out = capsys.readouterr().out
    assert "-| **images/s** | 3.40" in out and "+| **images/s** | 2.40" in out and "png" not in out
    readme.write_text(right)
    table = readme.parent / "scaling.csv"
    table.write_text(table.read_text().replace(",6.4,", ",6.3,"))
    assert headline(bench, readme, "--check") == 1
    assert capsys.readouterr().out == f"{readme.parent / 'docs/scaling.png'}: it does not show the rows\n"
    assert headline(bench, readme) == headline(bench, readme, "--check") == 0
    (readme.parent / "docs/waterfall.png").unlink()
    assert headline(bench, readme, "--check") == 1


@pytest.mark.parametrize("order", ["", "begin", "end begin", "begin end begin end"])
def test_missing_markers_are_named(bench, readme, capsys, order):
    content = " ".join(f"<!-- bench:{name} -->" for name in order.split())
    readme.write_text(content)
    for argv in ([], ["--check"]):
        assert headline(bench, readme, *argv) == 2
        assert "it needs the markers <!-- bench:begin --> and <!-- bench:end -->" in capsys.readouterr().err
    assert readme.read_text() == content


@pytest.mark.parametrize(
    "table, row, message",
    [
        ("scaling", dict(axis="width", value=1, median_s=1.0), "axis=width: valid is batch, "),
        ("peers", dict(peer="other", stage="total", median_s=1.0), "peer=other: valid is ours, "),
    ],
)
def test_what_is_not_known_is_named(bench, readme, capsys, table, row, message):
    bench.add(readme.parent, table, row)
    assert headline(bench, readme) == 2
    assert message in capsys.readouterr().err


def test_the_readme_is_what_the_rows_give(bench, capsys):
    assert bench.headline.main(["--check"]) == 0, capsys.readouterr().out
