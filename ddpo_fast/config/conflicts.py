"""What does not go together: one table, which a wrong command line is told of, and by which `auto` decides."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ddpo_fast import samplers
from ddpo_fast.algorithms import PolicyGradient, Regression


@dataclass(frozen=True)
class Feature:
    """Something that a config can ask for."""

    option: str
    asked: Callable[[object], bool]
    """Whether a config asks for it."""
    instead: str = ""
    """What the option may be otherwise, in words."""
    words: str | None = None
    """The feature in words; None: the option and its value."""

    def told(self, config) -> str:
        """The option and its value, as they can be typed."""
        value = config[self.option]
        return f"{self.option}={str(value).lower() if isinstance(value, bool) else value}"


FEATURES = {
    "deterministic": Feature("sample.sampler", lambda c: not samplers.find(c.sample.sampler).STOCHASTIC, "a sampler that draws noise"),
    "policy_gradient": Feature("train.algorithm", lambda c: isinstance(c.algorithm, PolicyGradient)),
    "window": Feature("sample.window", lambda c: c.sample.window is not None, "null"),
    "regression": Feature("train.algorithm", lambda c: isinstance(c.algorithm, Regression)),
    "one_update": Feature("train.algorithm", lambda c: c.algorithm.one_update, "ddpo_is"),
    "several_updates": Feature(
        "train.num_minibatches",
        lambda c: c.train.updates_per_iteration > 1,
        words="or exactly one update an iteration (train.num_minibatches=1, train.inner_epochs=1)",
    ),
    "score_accumulation": Feature("train.estimator", lambda c: c.train.estimator == "score_accumulation", "ppo"),
    "fraction": Feature("train.timestep_fraction", lambda c: c.train.timestep_fraction != 1, "1"),
    "kl": Feature("train.kl_coefficient", lambda c: c.train.kl_coefficient > 0, "0"),
    "checkpointing": Feature("train.gradient_checkpointing", lambda c: c.train.gradient_checkpointing, "false"),
    "cache": Feature("cache.mode", lambda c: c.cache.mode == "on", "auto or off"),
    "compile": Feature("model.compile", lambda c: c.model.compile, "false"),
    "whole": Feature("lora.scope", lambda c: c.lora.scope == "none", words="when lora.scope is none"),
    "initial_lora": Feature("lora.init", lambda c: c.lora.init is not None, "null"),
    "merged": Feature("lora.forward", lambda c: c.lora.forward == "merged", "auto or separate"),
    "quantized": Feature("model.quantize", lambda c: c.model.quantize != "none", "none"),
    "partitioned": Feature("zero.stage", lambda c: c.zero.stage == 3),
    "offload": Feature("zero.offload", lambda c: c.zero.offload != "none", "none"),
    "eight_bits": Feature("optimizer.name", lambda c: c.optimizer.name != "adamw"),
}

CONFLICTS = (
    ("deterministic", "policy_gradient", "a step without noise has no density, so there is no policy gradient"),
    ("window", "deterministic", "no step draws noise"),
    ("window", "regression", "it does not train on the steps that sampling makes"),
    ("one_update", "several_updates", "the score function is only unbiased on-policy"),
    ("score_accumulation", "regression", "its loss is not one of the steps that sampling makes"),
    ("score_accumulation", "several_updates", "a second update's gradient is not known while sampling"),
    ("score_accumulation", "whole", "a gradient of the whole network for every sample would not fit"),
    ("score_accumulation", "partitioned", "a sample's gradient is taken from whole weights"),
    ("fraction", "regression", "algorithm.num_timesteps says how many timesteps of a sample are trained on"),
    ("kl", "regression", "the loss has no such term"),
    ("kl", "whole", "the reference is the model with LoRA switched off"),
    ("kl", "score_accumulation", "it takes the gradient of the log-prob alone"),
    ("kl", "partitioned", "ZeRO 3 gathers weights in the order of one and the same forward pass"),
    ("kl", "compile", "to switch LoRA off and on between calls makes torch.compile give the network up"),
    ("checkpointing", "compile", "the compiler itself decides what to keep for backward"),
    ("checkpointing", "score_accumulation", "a step's gradient is taken while its activations are there"),
    ("cache", "regression", "what it trains on is not what the rollout computed"),
    ("cache", "score_accumulation", "no transition is visited twice"),
    ("cache", "partitioned", "ZeRO 3 gathers weights for whole calls"),
    ("cache", "whole", "nothing is frozen"),
    ("compile", "partitioned", "ZeRO 3 gathers weights between the network's layers"),
    ("compile", "quantized", "torch.compile ends with an error on layers whose weights are made for every call"),
    ("initial_lora", "whole", "there is no LoRA to start"),
    ("merged", "whole", "there is no LoRA to merge"),
    ("merged", "partitioned", "ZeRO 3 partitions the weights"),
    ("merged", "quantized", "so few bits would round the update away"),
    ("quantized", "whole", "weights of so few bits cannot be trained"),
    ("quantized", "partitioned", "ZeRO 3 partitions whole weights"),
    ("offload", "eight_bits", "paged_adamw_8bit moves its state to the host by itself"),
)
"""(a feature, another that it does not go with, why)."""


def conflicts(config) -> Iterator[str]:
    """A line for each pair of features that a config asks for and that do not go together."""
    for name, other, why in CONFLICTS:
        feature, against = FEATURES[name], FEATURES[other]
        if feature.asked(config) and against.asked(config):
            words = against.words or f"with {against.told(config)}"
            yield f"{feature.told(config)}: valid is {feature.instead}, {words}: {why}"


def possible(name: str, config) -> bool:
    """Whether a config asks for nothing that this feature conflicts with. `auto` goes by this."""
    others = [other if one == name else one for one, other, _ in CONFLICTS if name in (one, other)]
    return not any(FEATURES[other].asked(config) for other in others)
