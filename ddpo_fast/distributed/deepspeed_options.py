"""The user's own DeepSpeed JSON: which keys it may have, and which keys our options decide."""

import json
from pathlib import Path

BUCKET_ELEMENTS = 500_000_000
"""Gradients are reduced in buckets of at most this many elements."""
LIVE_ELEMENTS = 100_000_000
"""ZeRO 3 gathers at most this many weights before their use and releases them after it. DeepSpeed's default, 1e9, is all of SD's UNet."""
PERSISTENT_ELEMENTS = 10_000
"""ZeRO 3 leaves tensors up to this size whole on every rank: biases, norms, much of LoRA."""

OURS = {
    "train_batch_size": "sample.num_samples / train.num_minibatches",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "managed_gradient_accumulation": "train.micro_batch",
    "gradient_clipping": "train.max_grad_norm",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.round_robin_gradients": "the checkpoint's order of weights",
    "zero_optimization.compute_grad_norm": "train.max_grad_norm",
    "zero_optimization.cpu_offload": "zero.offload",
    "zero_optimization.cpu_offload_param": "zero.offload",
    "zero_optimization.offload_optimizer.device": "zero.offload",
    "zero_optimization.offload_param.device": "zero.offload",
    "optimizer": "optimizer.name, train.learning_rate",
    "scheduler": "train.learning_rate, which is constant",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "model.dtype",
    "activation_checkpointing": "train.gradient_checkpointing",
    "compile": "model.compile",
}
"""The keys of the JSON that our options decide, each by its path, and these options."""
FREE = (
    "zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "disable_allgather",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler", "tensorboard",
    "wandb", "csv_monitor", "comet", "aio", "checkpoint", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
)  # fmt: skip
"""Other keys, which DeepSpeed knows and which leave the algorithm alone. DeepSpeed would ignore a key that it does not know."""


def stated(stage: int, offload: str, max_grad_norm: float) -> dict:
    """The part of DeepSpeed's dict that our options state: zero.stage, zero.offload, train.max_grad_norm."""
    host = {"device": "cpu"}
    zero = {"stage": stage}
    zero |= {"offload_optimizer": host} if offload != "none" else {}
    zero |= {"offload_param": host} if offload == "all" else {}
    return {
        # DeepSpeed is not told of micro-batches: they are transitions whose number varies, and the loss is already a mean
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's would be compiled at the first start; torch's is fused, too
    }


def merge(base: dict, over: dict) -> dict:
    """`base` with the values of `over`, section by section."""
    both = {key: merge(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(base[key], dict)}
    return base | over | both


def read(path: str, ours: dict) -> dict:
    """The user's JSON, to be merged over `ours`, the part of DeepSpeed's dict that our options state.

    The value "auto", known from Hugging Face's integration, is left to us, and so is a section that is not enabled. Raises ValueError
    for what cannot be read, what contradicts our options and what DeepSpeed does not know.
    """

    def refuse(why: str):
        raise ValueError(f"deepspeed.config={path}: {why}")

    try:
        user = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        refuse(f"cannot be read: {error}")
    if not isinstance(user, dict):
        refuse("valid is a JSON object")

    def check(given: dict, known: dict, prefix: str = "") -> dict:
        kept = {}
        for key, value in given.items():
            name, our_value = prefix + key, known.get(key)
            unused = our_value is None and value in ("none", {"enabled": False})
            if value == "auto" or (name in OURS and (value == our_value or unused)):
                continue
            if name in OURS:
                refuse(f"{name} is decided by {OURS[name]}" + (f" ({our_value})" if our_value is not None else "") + "; leave it out")
            if not prefix and key not in FREE:
                refuse(f"there is no {key}; valid is any of {', '.join(FREE)}")
            inside = name in ("zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param")
            if inside and not isinstance(value, dict):
                refuse(f"{name}={value}: valid is an object")
            if our_value is not None and not inside and value != our_value:
                refuse(f"{name}={json.dumps(value)}: valid is {json.dumps(our_value)}")
            kept[key] = check(value, our_value or {}, f"{name}.") if inside else value
        return kept

    user = check(user, ours)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # after `engine` has told DeepSpeed what it runs on

    try:
        DeepSpeedZeroConfig(**merge(ours, user)["zero_optimization"])
    except ValueError as error:  # an error of pydantic has several lines
        refuse(f"zero_optimization: {' '.join(str(error).split())}")
    return user
