"""What an option is by default, where that depends on the model: its family's published settings, or the demo's for embedded models."""

import json
from collections.abc import Mapping
from pathlib import Path

from ddpo_fast.pipelines.families import FAMILIES, UNLISTED
from ddpo_fast.places import is_hub_id, located

EMBEDDED = Path(__file__).resolve().parents[1] / "embedded"
"""Of its models, the UNet's defaults are those of the options' classes."""
_EMBEDDED_FLOW = {
    "sample.sampler": "cps", "sample.eta": 0.8, "sample.window": {"size": 6, "among": 6}, "sample.guidance_scale": 1.0,
    "eval.sampler": "ode", "lora.targets": ["attention", "feed_forward"], "train.learning_rate": 2e-3, "run.iterations": 5,
}  # fmt: skip


def published(path: str, config: str | None, whole: bool, unlisted: bool, sampler: str | None) -> Mapping[str, object]:
    """The defaults of options for a model, by the class in its model_index.json; none for a model that is not there, or is none.

    path, config, unlisted: options of model. whole: whether the whole network is trained, which wants smaller steps. sampler: the one that
    is asked for; None: the family's. Raises ValueError for a model that has to be on the hub and is not found there.
    """
    option, place = ("model.path", path) if config is None else ("model.config", config)
    found = _settings(option, place, whole, unlisted)
    if sampler not in (None, found.get("sample.sampler")):  # eta and window are those of the sampler beside them
        found = {name: value for name, value in found.items() if name not in ("sample.eta", "sample.window")}
    return found


def _settings(option: str, place: str, whole: bool, unlisted: bool) -> Mapping[str, object]:
    folder = Path(located(option, place))
    if folder.parent == EMBEDDED:
        return _EMBEDDED_FLOW if folder.name == "flow_model" else {}
    name = _class_of(option, place, folder)
    if name not in FAMILIES and not (unlisted and name is not None):
        return {}
    found = FAMILIES[name].published if name in FAMILIES else UNLISTED
    return {**found, "train.learning_rate": 1e-5} if whole else found


def _class_of(option: str, place: str, folder: Path) -> str | None:
    for name, family in FAMILIES.items():
        if place in family.models and not folder.is_dir():
            return name
    if is_hub_id(place):
        from ddpo_fast.pipelines.hub import local_folder  # here, because it takes half a second to import

        folder = local_folder(option, place)
    try:
        name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        return name if isinstance(name, str) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # whoever opens it says what is wrong with it
        return None
