"""Checks of the operations' arguments, the same for every backend. Each error is one line that names the argument."""

import torch
from torch import Tensor

TRITON_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_FLOATS = (*TRITON_FLOATS, torch.float64)  # only the operations of `reference` take fp64


def _shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; valid here is {expected}")


def _index(name: str, tensor: Tensor, num_rows: int) -> None:
    _shape(name, tensor, (num_rows,))
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name}: dtype {tensor.dtype}; valid is torch.int64")


def _same_device(**tensors: Tensor) -> None:
    (first, expected), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != expected.device:
            raise ValueError(f"{name}: on {tensor.device}, but {first} is on {expected.device}")


def _wide(**tensors: Tensor) -> None:
    """Raises ValueError unless all tensors, which are latents or computed from latents, have the same dtype: fp32, or fp64 in tests."""
    (first, expected), *others = tensors.items()
    if expected.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{first}: dtype {expected.dtype}; valid is torch.float32: rounded latents have another log-prob")
    for name, tensor in others:
        if tensor.dtype != expected.dtype:
            raise ValueError(f"{name}: dtype {tensor.dtype}; valid is {expected.dtype}, that of {first}")


def _noise_pred_and_table(noise_pred: Tensor, latents: tuple[int, ...], coefficients: Tensor) -> None:
    num_rows, *inner = latents
    if list(noise_pred.shape[1:]) != inner or len(noise_pred) not in (num_rows, 2 * num_rows):
        raise ValueError(
            f"noise_pred: shape {tuple(noise_pred.shape)}; valid here is that of the latents, {latents}, or {(2 * num_rows, *inner)} with "
            "both guidance branches"
        )
    if noise_pred.dtype not in _FLOATS:
        raise ValueError(f"noise_pred: dtype {noise_pred.dtype}; valid are torch.float32, torch.float16, torch.bfloat16")
    if coefficients.dim() != 2 or coefficients.shape[1] not in (4, 7) or not len(coefficients):
        raise ValueError(f"coefficients: shape {tuple(coefficients.shape)}; valid is (steps, 4), or (steps, 7) with x0 clipping")


def check_ddim_step(
    noise_pred: Tensor, latents: Tensor, coefficients: Tensor, steps: Tensor, seed: int, sample_ids: Tensor, dtype: torch.dtype | None
) -> None:
    """Raises ValueError for arguments of `ddim_step` whose shape, dtype or device does not fit."""
    if latents.dim() < 2 or not latents.numel():
        raise ValueError(f"latents: shape {tuple(latents.shape)}; valid is (B, *shape) with at least one element")
    _noise_pred_and_table(noise_pred, tuple(latents.shape), coefficients)
    _index("steps", steps, len(latents))
    _index("sample_ids", sample_ids, len(latents))
    _wide(latents=latents, coefficients=coefficients)
    _same_device(latents=latents, noise_pred=noise_pred, coefficients=coefficients, steps=steps, sample_ids=sample_ids)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}: valid is a whole number in [0, 2^63)")
    if dtype is not None and dtype not in _FLOATS:
        raise ValueError(f"dtype={dtype}: valid are torch.float32, torch.float16, torch.bfloat16")


def check_ppo_loss(
    noise_pred: Tensor, latents: Tensor, old_log_probs: Tensor, advantages: Tensor, coefficients: Tensor, rows: Tensor, steps: Tensor
) -> None:
    """Raises ValueError for arguments of `ppo_loss` whose shape, dtype or device does not fit."""
    if latents.dim() < 3 or not latents.numel() or latents.shape[1] < 2:
        raise ValueError(f"latents: shape {tuple(latents.shape)}; valid is (M, S + 1, *shape) with at least one step and one element")
    num_samples, num_latents, *inner = latents.shape
    if rows.dim() != 1 or not len(rows):
        raise ValueError(f"rows: shape {tuple(rows.shape)}; valid is (B,) with B >= 1")
    _index("rows", rows, len(rows))
    _index("steps", steps, len(rows))
    _noise_pred_and_table(noise_pred, (len(rows), *inner), coefficients)
    _shape("coefficients", coefficients, (num_latents - 1, coefficients.shape[1]))
    _shape("old_log_probs", old_log_probs, (num_samples, num_latents - 1))
    _shape("advantages", advantages, (num_samples,))
    _wide(latents=latents, old_log_probs=old_log_probs, advantages=advantages, coefficients=coefficients)
    _same_device(
        latents=latents, noise_pred=noise_pred, old_log_probs=old_log_probs, advantages=advantages, coefficients=coefficients, rows=rows,
        steps=steps,
    )  # fmt: skip


def check_fp32(latents: Tensor, noise_pred: Tensor) -> None:
    """Raises ValueError for fp64, which only the operations of `reference` take."""
    for name, tensor in (("latents", latents), ("noise_pred", noise_pred)):
        if tensor.dtype == torch.float64:
            raise ValueError(f"{name}: dtype torch.float64; valid in Triton is torch.float32{', float16, bfloat16' * (name != 'latents')}")


def check_values(coefficients: Tensor, *, steps: Tensor, rows: Tensor | None = None, num_rows: int = 0) -> None:
    """Raises ValueError for an index out of range or a bad s. Checks on a CPU only: on a GPU, reading the values would synchronise.

    rows: given for a loss. A step with s = 0 is then an error, too, because it has no density.
    """
    if coefficients.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for name, index, length in (("steps", steps, len(coefficients)), ("rows", rows, num_rows)):
        if index is not None and (index.min() < 0 or index.max() >= length):
            wrong = index[(index < 0) | (index >= length)][0]
            raise ValueError(f"{name}: {int(wrong)} is out of range; valid is 0 to {length - 1}")
    std = coefficients[steps, 2]
    if rows is not None and not std.gt(0).all():
        raise ValueError(f"coefficients: a step's s is {float(std.min())}, so it has no log-prob to train on; valid is s > 0")
    if not std.ge(0).all():
        raise ValueError(f"coefficients: a step's s is {float(std.min())}; valid is s >= 0")
    if (coefficients[steps, 3] * (std == 0)).any():
        raise ValueError("coefficients: a step with s = 0 has a log(s sqrt(2 pi)) other than 0; valid is 0")


def _check_floats(dtypes: tuple[torch.dtype, ...], **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name}: dtype {tensor.dtype}; valid are {', '.join(map(str, dtypes))}")


def check_group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, dtypes: tuple[torch.dtype, ...] = _FLOATS
) -> None:
    """Raises ValueError for arguments of `group_norm_silu` whose shape, dtype or device does not fit."""
    if x.dim() != 4 or not x.numel():
        raise ValueError(f"x: shape {tuple(x.shape)}; valid is (B, C, H, W) with at least one element")
    _check_floats(dtypes, x=x)
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"num_groups={num_groups}: valid is a divisor of the number of channels, {x.shape[1]}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dim() != 1 or len(tensor) != x.shape[1]:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; valid here is ({x.shape[1]},), one for each channel")
        _check_floats(dtypes, **{name: tensor})
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, but x is on {x.device}")


def check_geglu(x: Tensor, dtypes: tuple[torch.dtype, ...] = _FLOATS) -> None:
    """Raises ValueError for an argument of `geglu` that does not fit."""
    if not x.dim() or not x.numel() or x.shape[-1] % 2:
        raise ValueError(f"x: shape {tuple(x.shape)}; valid is (..., 2D) with at least one element")
    _check_floats(dtypes, x=x)
