"""What a reward may return: one number for each picture, in any form that is usual for numbers."""

import math
import numbers
from collections.abc import Mapping
from decimal import Decimal

import numpy as np
import torch
from torch import Tensor


class NotNumbers(ValueError):
    """An answer that is not one number for each picture; the message says what it is."""


def to_numbers(answer: object, count: int) -> Tensor:
    """The `count` numbers in a reward's answer: (count,) fp64 on the CPU. NaN stands for None, infinity for what fp64 cannot hold.

    answer: a list, tuple, array or tensor of any kind; axes of length 1 do not matter. It may also be (numbers, info), as in ddpo-pytorch
    and TRL; info, a dict or None, is left out. Raises NotNumbers.
    """
    if isinstance(answer, tuple) and len(answer) == 2:
        several = isinstance(answer[0], list | tuple) or getattr(answer[0], "ndim", 0) > 0
        if isinstance(answer[1], Mapping) or answer[1] is None and several:
            answer = answer[0]
    valid = f"; valid is one number for each picture, {count} here"
    if answer is None:
        raise NotNumbers(f"None: is there a `return` that is never reached?{valid}")
    values = np.array(_nested(answer, count, valid), dtype=object)
    if values.ndim == 0 and not _is_number(values.item()):
        raise NotNumbers(f"{_named(answer)}{valid}")
    if values.size != count or max(values.shape, default=1) != count:
        raise NotNumbers(f"{_named(answer)}{f' of shape {values.shape}' if values.ndim else ''}{valid}")
    for value in values.flat:
        if value is not None and not _is_number(value):
            raise NotNumbers(f"{_named(answer)} with {str(value)[:40]!r}, which is no number{valid}")
    return torch.tensor([math.nan if value is None else _float(value) for value in values.flat], dtype=torch.float64)


def _nested(answer: object, count: int, valid: str) -> object:
    """The answer, which may be an array or lists of arrays, as lists in lists."""
    if isinstance(answer, Tensor):
        answer = answer.detach()
    elif hasattr(answer, "__array__"):
        answer = np.asanyarray(answer)
    if isinstance(answer, Tensor | np.ndarray):
        if math.prod(answer.shape) > count:  # perhaps pictures, which have millions of numbers
            raise NotNumbers(f"{_named(answer)} of shape {tuple(answer.shape)}{valid}")
        if isinstance(answer, np.ndarray) and answer.dtype.kind in "mM":
            raise NotNumbers(f"{_named(answer)} of {answer.dtype}{valid}")
        answer = answer.tolist()
    if not isinstance(answer, list | tuple):
        return answer
    values = [_nested(value, count, valid) for value in answer]
    return [value[0] if isinstance(value, list) and len(value) == 1 else value for value in values]


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real | Decimal)


def _float(value: object) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _named(answer: object) -> str:
    if isinstance(answer, Mapping):
        return f"a {type(answer).__name__} with the keys {', '.join(map(str, answer))}"[:80]
    if isinstance(answer, str) or _is_number(answer):
        return f"{answer!r}"[:40]
    return f"a {type(answer).__name__}"
