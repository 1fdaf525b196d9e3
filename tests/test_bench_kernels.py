"""The kernel benchmark reports no time of an operation that computes something else."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"ddim_step": (4, 4, 8, 8), "ppo_loss": (4, 4, 8, 8), "group_norm_silu": (2, 32, 8, 8), "geglu": (16, 32)}


class OffGradient(torch.autograd.Function):
    """The identity with a gradient that is 2 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, upstream):
        return 1.02 * upstream


def scaled(number: int, factor: float):
    """Makes one output of an operation wrong by a factor."""

    def breaks(operation):
        def broken(*inputs):
            out = operation(*inputs)
            return tuple(factor * x if i == number else x for i, x in enumerate(out)) if isinstance(out, tuple) else factor * out

        return broken

    return breaks


def shifted_log_prob(ddim_step):
    def broken(*inputs):
        next_latents, log_probs, unet_input = ddim_step(*inputs)
        return next_latents, log_probs + 1e-3, unet_input

    return broken


def off_gradient(operation):
    return lambda leaf, *others: operation(OffGradient.apply(leaf), *others)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the benchmarks of small inputs, plain PyTorch only; returns the exit status and (op, direction, dtype) of its rows."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # beside other tests pytest-benchmark measures nothing
    from bench import kernels, rows

    def run(broken_op: str | None = None, breaks=None, argv: tuple[str, ...] = ()):
        cases = [kernels.Case(op, shape, dtype) for op, shape in SHAPES.items() for dtype in (torch.float32, torch.bfloat16)]
        provide = kernels.provide
        monkeypatch.setattr(kernels, "cases", lambda: cases)
        monkeypatch.setattr(kernels, "providers", lambda: {"eager": ""})
        monkeypatch.setattr(kernels, "copy_bandwidth", lambda: 1e10)
        monkeypatch.setattr(kernels, "provide", lambda name, op: breaks(provide(name, op)) if op == broken_op else provide(name, op))
        status = kernels.main(["--out", str(tmp_path), "-p", "no:cacheprovider", "--tb=line", *argv])
        return status, {(row["op"], row["direction"], row["dtype"]) for row in rows.read("kernels", tmp_path)}

    return run


def rows_but(*left_out: tuple[str, str]) -> set[tuple[str, str, str]]:
    every = [(op, direction) for op in SHAPES for direction in ("forward", "backward") if (op, direction) != ("ddim_step", "backward")]
    return {(*row, dtype) for row in every if row not in left_out for dtype in ("float32", "bfloat16")}


def test_right_operations_are_reported(run):
    assert run() == (0, rows_but())


@pytest.mark.parametrize(
    "op, breaks, refused",
    [
        ("ddim_step", scaled(0, 1.01), ["forward"]),
        ("ddim_step", shifted_log_prob, ["forward"]),
        ("ddim_step", scaled(2, 1.01), ["forward"]),
        ("ddim_step", scaled(0, float("nan")), ["forward"]),
        ("ppo_loss", scaled(0, 1.01), ["forward", "backward"]),
        ("ppo_loss", scaled(1, 1.01), ["forward"]),
        ("ppo_loss", off_gradient, ["backward"]),
        ("group_norm_silu", scaled(0, 1.01), ["forward", "backward"]),
        ("group_norm_silu", off_gradient, ["backward"]),
        ("geglu", off_gradient, ["backward"]),
    ],
    ids=(
        "next_latents log_prob unet_input nan loss statistics loss_gradient group_norm_silu group_norm_silu_gradient geglu_gradient"
    ).split(),
)
def test_a_wrong_operation_has_no_row(run, capfd, op, breaks, refused):
    status, measured = run(op, breaks)
    assert status == 1
    assert measured == rows_but(*((op, direction) for direction in refused))
    assert "is tolerated" in capfd.readouterr().out


def test_the_command_is_in_the_row(run, tmp_path):
    from bench import rows

    assert run(argv=("-k", "geglu and float32"))[0] == 0
    assert {row["command"] for row in rows.read("kernels", tmp_path)} == {
        "python -m bench.kernels -p no:cacheprovider --tb=line -k 'geglu and float32'"
    }
