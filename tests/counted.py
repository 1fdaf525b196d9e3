"""Each model is counted once for all tests that ask for the same of it: a count of Stable Diffusion 1.5 takes as long as ten runs."""

from pathlib import Path

from ddpo_fast.config.options import ModelConfig
from ddpo_fast.planning import architectures, counts

_found: dict[str, counts.ModelCounts] = {}


def architecture(path: Path | str) -> dict[str, dict]:
    """The configs of a UNet's pipeline, in a folder or known."""
    options = ModelConfig(path=str(path))
    return architectures.architecture(options, architectures.planned_model(options))


def count_model(arch, dtype, lora, **options) -> counts.ModelCounts:
    key = repr((arch, dtype, lora.scope, lora.targets, lora.rank, lora.alpha, sorted(options.items())))
    if key not in _found:
        _found[key] = counts.count_model(arch, dtype, lora, **options)
    return _found[key]
