"""From a command line to a config: recipes, what a run to be resumed began with, and one line for what is wrong."""

import ast
import dataclasses
import difflib
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import jsonargparse
import yaml

from ddpo_fast import algorithms, rewards, samplers
from ddpo_fast.config.options import CacheConfig, Config, ModelConfig, RunConfig, TrainConfig, mismatch
from ddpo_fast.config.published import published
from ddpo_fast.gpus import HERE
from ddpo_fast.places import PLACES, is_missing, located, located_kwargs, may_be_same
from ddpo_fast.terminal import user_error


def _parser(algorithm: str, defaults: str) -> jsonargparse.ArgumentParser:
    """The parser of all options. `algorithm.*` are those of one algorithm. defaults: JSON of those that are not their classes' own."""
    parser = jsonargparse.ArgumentParser(
        prog="deepspeed ddpo_fast/train.py",
        usage="%(prog)s [--config RECIPE] [--section.option VALUE ...] [--resume] [--plan[=DEVICES]]",
        description="Improves a text-to-image diffusion model by reinforcement learning (DDPO). Without options, the embedded "
        "model learns to draw pictures that compress well.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="A recipe: a YAML file of differences from the defaults.")
    for section in dataclasses.fields(Config):
        parser.add_class_arguments(algorithms.find(algorithm) if section.name == "algorithm" else section.type, section.name)
    for action in parser._actions:
        if choices := {"train.algorithm": algorithms, "sample.sampler": samplers, "reward.name": rewards}.get(action.dest):
            action.help = f"{action.help} {_told(choices)}"
    parser.set_defaults(json.loads(defaults))
    return parser


def _told(choices: ModuleType) -> str:
    """The choices of a folder, each with the first paragraph that its file says of it. No file is imported."""
    told = []
    for name in choices.CHOICES:
        tree = ast.parse(Path(choices.__path__[0], f"{name}.py").read_text(encoding="utf-8"))
        documented = [node for node in (tree, *tree.body) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        paragraph = next(filter(None, map(ast.get_docstring, documented)), "").split("\n\n")[0]
        told.append(f"{name}: {' '.join(paragraph.split()).rstrip('.')}.")
    return " ".join(told).replace("%", "%%")


def parse(argv: list[str]) -> Config:
    """The config of a command line, its places as absolute paths. Raises ValueError with one line that names the option, its value and
    what is valid."""
    short = {"--resume": "--run.resume=true", "--plan": f"--run.plan={HERE}"}
    argv = [short.get(arg, arg) for arg in argv if not arg.startswith("--local_rank")]
    argv = [f"--run.{arg[2:]}" if arg.startswith("--plan=") else arg for arg in argv]
    argv = [f"--config={os.path.expanduser(arg[9:])}" if arg.startswith("--config=") else arg for arg in argv]
    try:
        _check_values(argv)
        began = _began(argv)
        argv = [*began, *argv]
        parser, options = _parsed(argv, {} if began else _published(argv))  # a run's config.yaml has all options
        sections = parser.instantiate(options)
        config = _with_places(Config(**{section.name: sections[section.name] for section in dataclasses.fields(Config)}))
        if config.run.resume:
            _check_places(config)
        config.check()
        if config.run.resume:
            _check_resumed(config)
        return config
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(_one_line(str(error))) from None


def _began(argv: list[str]) -> list[str]:
    """What a run that is to be resumed began with, as the beginning of a command line; nothing for a new run."""
    folder = _last(argv, "run.dir", None)
    if str(_last(argv, "run.resume", False)).lower() != "true" or not folder:
        return []
    began = ["--config", os.path.join(located("run.dir", str(folder)), "config.yaml")]
    if not os.path.exists(began[1]):
        return []
    _check_values(began)
    _check_known(began)
    own = _last(began, "train.algorithm", TrainConfig().algorithm)
    if (asked := _last(argv, "train.algorithm", own)) != own:
        raise ValueError(f"train.algorithm={asked}: the run in run.dir={folder} began with {own}; --resume keeps it")
    return began


def _parsed(argv: list[str], defaults: Mapping[str, object]) -> tuple[jsonargparse.ArgumentParser, jsonargparse.Namespace]:
    """A command line's options, and the parser that knows those of its algorithm. defaults: those that are not their classes' own."""
    parser = _parser(_checked(_last(argv, "train.algorithm", TrainConfig().algorithm)), json.dumps(defaults))
    return parser, parser.parse_args(argv)


def _published(argv: list[str]) -> Mapping[str, object]:
    """The defaults of a command line's model."""
    path, config = _last(argv, "model.path", ModelConfig().path), _last(argv, "model.config", None)
    if not isinstance(path, str) or not isinstance(config, str | None):
        return {}  # the parser refuses that
    unlisted = str(_last(argv, "model.unlisted", False)).lower() == "true"
    return published(path, config, _last(argv, "lora.scope", None) == "none", unlisted, _last(argv, "sample.sampler", None))


def _last(argv: list[str], option: str, default: object) -> object:
    """What a command line and its recipes say of an option, before they are parsed."""
    (section, key), found = option.split("."), default
    for name, value in zip(argv, [*argv[1:], ""]):
        if "=" in name:
            name, value = name.split("=", 1)
        if name == "--config":
            found = (_recipe(value).get(section) or {}).get(key, found)
        elif name == f"--{section}":  # a mapping, or a file that has one
            with suppress(yaml.YAMLError, AttributeError, OSError):
                text = Path(value).read_text(encoding="utf-8") if os.path.isfile(value) else value
                found = yaml.load(text, _Loader).get(key, found)
        elif name == f"--{option}":
            found = value
    return found


def _checked(algorithm: str) -> str:
    if algorithm not in algorithms.CHOICES:
        raise ValueError(f"train.algorithm={algorithm}: valid is one of {', '.join(algorithms.CHOICES)}")
    return algorithm


def _with_places(config: Config) -> Config:
    changed = {option.replace(".", "__"): located(option, config[option]) for option in PLACES if config[option] is not None}
    return config.replace(**changed, reward__kwargs=located_kwargs(config.reward.kwargs))


def _check_known(began: list[str]) -> None:
    """Raises ValueError for a run whose config.yaml has what this version does not know."""
    try:
        _parsed(began, {})
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise ValueError(
            f"{began[1]}: {_one_line(str(error))} (another version may have written it; change or remove that option in "
            "the file, then --resume)"
        ) from None


def _check_places(config: Config) -> None:
    """Raises ValueError for what a resumed run needs and does not find."""
    for option in PLACES:
        if option not in ("run.dir", "lora.init") and config[option] is not None and is_missing(option, config[option]):
            raise ValueError(f"{option}={config[option]}: there is nothing of this name now; add --{option}=PLACE to say where it is")


_FREE_ON_RESUME = {
    "sample.batch_size", "sample.decode_batch", "train.micro_batch", "train.gradient_checkpointing", "model.offload_text_encoder",
    "model.encode_on_host", "model.offload_vae", "model.variant",
    "reward.timeout_s", "reward.isolate", "reward.max_bad_fraction", "eval.every",
    *(f"cache.{option.name}" for option in dataclasses.fields(CacheConfig)),
    *(f"run.{option.name}" for option in dataclasses.fields(RunConfig) if option.name != "seed"),
}  # fmt: skip


_RESOLVED = ("model.dtype", "auto"), ("attention.backend", "auto")
"""What a run's config.yaml has the outcome of."""


def _check_resumed(config: Config) -> None:
    """A resumed run goes on as it began: what shapes it cannot be changed halfway."""
    path = Path(config.run.dir, "config.yaml")
    began = yaml.load(path.read_text(encoding="utf-8"), _Loader) if path.exists() else None
    if not isinstance(began, dict):
        raise ValueError(f"run.dir={config.run.dir}: its config.yaml is missing or damaged, so --resume cannot know how the run began")
    for section, values in dataclasses.asdict(config).items():
        for key, value in values.items():
            option = f"{section}.{key}"
            # an option that is newer than the run is free, but for the one without whose iteration 0 there is no before
            before = began.get(section, {}).get(key, None if option == "eval.heldout" else value)
            if option in (*PLACES, "reward.kwargs") and may_be_same(option, value, before):
                continue
            if value != before and option not in _FREE_ON_RESUME and (option, value) not in _RESOLVED:
                raise ValueError(f"{option}={value}: the run in run.dir={config.run.dir} began with {before}; --resume keeps it")


class _Refused(yaml.MarkedYAMLError):
    """YAML that may be valid and still is nothing that an option means."""


class _Loader(yaml.SafeLoader):
    """YAML without what grows beyond its text or means something else than it seems: aliases, keys given twice, endless numbers."""

    depth = 0

    def compose_node(self, parent, index):
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise _Refused(problem="there are no aliases here", problem_mark=mark)
        self.depth += 1
        if self.depth > 50:
            raise _Refused(problem="nested too deeply", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise _Refused(problem=f"{twice} is given twice", problem_mark=mark)
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > 100:
            raise _Refused(problem="a number of too many digits", problem_mark=mark)
        return node


def _check_values(argv: list[str]) -> None:
    """Raises ValueError, naming the option, for values that the parser below would take too far, and for recipes that are none."""
    for option, value in zip(argv, [*argv[1:], ""]):
        if "=" in option:
            option, value = option.split("=", 1)
        if option == "--config":
            _recipe(value)
            continue
        try:
            yaml.compose(value, _Loader)
        except _Refused as error:
            shown = " ".join(value[:40].split()) + "..." * (len(value) > 40)
            raise ValueError(f"{option.removeprefix('--')}={shown}: {error.problem}") from None
        except yaml.YAMLError:
            pass  # a string


def _recipe(path: str) -> dict[str, dict]:
    """The sections of a recipe. Raises ValueError for what is none."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(0, "not a file")  # a device or a pipe may never end
        sections = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    nested = isinstance(sections, dict) and all(isinstance(values, dict) for values in sections.values())
    if not nested or not all(isinstance(key, str) for keys in (sections, *sections.values()) for key in keys):
        raise ValueError(f"--config {path}: valid is a mapping of sections, each a mapping of options, as --print_config shows")
    return sections


def _one_line(message: str) -> str:
    """jsonargparse's message as one line that names the option, its value and what is valid."""
    if found := re.match(r"""Parser key "([\w.]+)":\s*Expected an? (.*?)\.? Got value: (.*)""", message, re.S):
        return mismatch(*found.groups())
    if found := re.match(r"""Parser key "([\w.]+)":.*Subtypes: \[(.*?)\]\s.*Given value: (.*)""", message, re.S):
        return mismatch(*found.groups())
    options = {f"{s.name}.{o.name}": "" for s in dataclasses.fields(Config) for o in dataclasses.fields(s.type)}
    for name in algorithms.CHOICES:
        for option in dataclasses.fields(algorithms.find(name)):
            others = options.get(f"algorithm.{option.name}", "with train.algorithm=")
            options[f"algorithm.{option.name}"] = f"{others}{', ' * (others[-1] != '=')}{name}"
    if found := re.match(r"unrecognized arguments: (?:--)?([^\s=]*)", message):
        unknown = found[1]
    elif found := re.match(r"Option '(.*)' is not accepted", message):
        unknown = found[1]
    elif found := re.match(r"Group '(.*)' does not accept option '(.*)'", message):
        unknown = ".".join(found.groups())
    else:
        return " ".join(message.split())
    if options.get(unknown):
        return f"{unknown}: it is an option {options[unknown]}"
    close = difflib.get_close_matches(unknown, sorted(options), n=3, cutoff=0.5)
    return f"{unknown}: no such option; {'did you mean ' + ' or '.join(close) + '?' if close else 'see --help'}"


RANK_0_SAYS_IT_S = 30
"""How long the other ranks wait for rank 0 to say what is wrong with the command line."""


def parse_or_exit(argv: list[str]) -> Config:
    """`parse`, with a bad command line ended by `user_error`."""
    try:
        return parse(argv)
    except ValueError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(RANK_0_SAYS_IT_S)  # every rank has the same command line, and the first to end ends the others
        user_error(error)
