"""Each model is counted once for all tests that ask for the same of it: a count of Stable Diffusion 1.5 takes as long as ten runs."""

from pathlib import Path

from ddpo_fast.config.options import ModelConfig
from ddpo_fast.pipelines import folders
from ddpo_fast.planning import architectures, counts

_found: dict[str, counts.ModelCounts] = {}
_models: dict[str, folders.Model | None] = {}


def architecture(path: Path | str) -> dict[str, dict]:
    """The configs of a UNet's pipeline, in a folder or known."""
    options = ModelConfig(path=str(path))
    return architectures.architecture(options, architectures.planned_model(options))


def count_model(arch, dtype, lora, **options) -> counts.ModelCounts:
    key = repr((arch, dtype, lora.scope, lora.targets, lora.rank, lora.alpha, sorted(options.items())))
    if key not in _found:
        _found[key] = counts.count_model(arch, dtype, lora, **options)
    return _found[key]


def planned_model(options: ModelConfig) -> folders.Model | None:
    """The model of these options, always the same one: it keeps what has been recorded of it."""
    key = repr((options.path, options.config, options.vae, options.parts, options.arguments, options.quantize))
    if key not in _models:
        _models[key] = architectures.planned_model(options)
    return _models[key]


def count_flow(model, asked, prompt, dtype, lora, **options) -> counts.ModelCounts:
    """Of a model of `planned_model`."""
    key = repr((id(model), asked, prompt, dtype, lora, sorted(options.items())))
    if key not in _found:
        _found[key] = counts.count_flow(model, asked, prompt, dtype, lora, **options)
    return _found[key]
