"""A run's LoRA as one file in kohya's format, which ComfyUI, AUTOMATIC1111 and others read.  ddpo-fast kohya RUN_DIR"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddpo_fast.files import new_file
from ddpo_fast.places import NETWORKS, lora_file, typed_path
from ddpo_fast.terminal import steady_streams


def _joined(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 1)


_QKV, _ADDED_QKV = _joined("attn.to_q", "attn.to_k", "attn.to_v"), _joined("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
TRANSFORMERS: dict[str, dict[str, tuple[str, dict[str, dict[str, int]]]]] = {
    "FluxTransformer2DModel": {
        "transformer_blocks": (
            "double_blocks",
            {
                "img_attn_qkv": _QKV,
                "txt_attn_qkv": _ADDED_QKV,
                "img_attn_proj": _joined("attn.to_out.0"),
                "txt_attn_proj": _joined("attn.to_add_out"),
                "img_mlp_0": _joined("ff.net.0.proj"),
                "img_mlp_2": _joined("ff.net.2"),
                "txt_mlp_0": _joined("ff_context.net.0.proj"),
                "txt_mlp_2": _joined("ff_context.net.2"),
                "img_mod_lin": _joined("norm1.linear"),
                "txt_mod_lin": _joined("norm1_context.linear"),
            },
        ),
        "single_transformer_blocks": (
            "single_blocks",
            {"linear1": _QKV | {"proj_mlp": 4}, "linear2": _joined("proj_out"), "modulation_lin": _joined("norm.linear")},
        ),
    },
    "SD3Transformer2DModel": {
        "transformer_blocks": (
            "joint_blocks",
            {
                "x_block_attn_qkv": _QKV,
                "x_block_attn2_qkv": _joined("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "context_block_attn_qkv": _ADDED_QKV,
                "x_block_attn_proj": _joined("attn.to_out.0"),
                "x_block_attn2_proj": _joined("attn2.to_out.0"),
                "context_block_attn_proj": _joined("attn.to_add_out"),
                "x_block_mlp_fc1": _joined("ff.net.0.proj"),
                "x_block_mlp_fc2": _joined("ff.net.2"),
                "context_block_mlp_fc1": _joined("ff_context.net.0.proj"),
                "context_block_mlp_fc2": _joined("ff_context.net.2"),
                "x_block_adaLN_modulation_1": _joined("norm1.linear"),
                "context_block_adaLN_modulation_1": _joined("norm1_context.linear"),
            },
        ),
    },
}
"""By a transformer's class what kohya, like ComfyUI, calls its lists of blocks and their layers: those of the network as it was published.

For each layer the layers of diffusers that it joins, in order, and how many times the first one's outputs each of them has.
"""


def write_kohya(run_dir: Path, output: Path | None = None) -> Path:
    """Writes <run_dir>/lora, or the LoRA in run_dir itself, under kohya's names: for a layer a.b.0.c of the UNet

    lora_unet_a_b_0_c.lora_down.weight (r, I) or (r, I, k, k), .lora_up.weight (O, r) or (O, r, 1, 1) and .alpha, a scalar. They add
    alpha / r up down to the layer's weight. Of a transformer's layers that are joined there, n of them, the rank is n r. Returns the
    file, by default <name of run_dir>.safetensors beside the LoRA's folder. Raises ValueError if there is no LoRA yet, or one of a
    transformer that is none of `TRANSFORMERS`.
    """
    source = lora_file(str(run_dir))
    if source is None:
        whole = next((name for name in NETWORKS if (run_dir / name).is_dir()), None)
        instead = f"fully fine-tuned, so that there is no LoRA: its {whole}/ is the result" if whole else "no lora/ yet"
        raise ValueError(f"RUN_DIR={run_dir}: {instead}; valid is the directory of a run of LoRA with a checkpoint, or its lora/")
    folder = source.absolute().parent  # not resolved: the hub's files are links
    output = output or folder.parent / f"{(run_dir if run_dir.is_dir() else folder).resolve().name}.safetensors"
    if output.suffix != ".safetensors":
        raise ValueError(f"--output={output}: valid is a name that ends in .safetensors")
    try:
        with safe_open(source, "pt") as file:
            adapter = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{source}: cannot be read: {error}") from None
    converted, rank, alpha = _converted(source, tensors, adapter)
    metadata = {
        "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha), "ss_output_name": output.stem,
    }  # fmt: skip
    try:
        with new_file(output) as partial:
            save_file(converted, partial, metadata)
    except SafetensorError as error:
        raise ValueError(f"--output={output}: cannot be written: {error}") from None
    return output


def _converted(source: Path, tensors: dict[str, Tensor], adapter: Mapping[str, object]) -> tuple[dict[str, Tensor], int, float]:
    """The tensors under kohya's names, with rank and alpha. adapter: what the file says of itself."""
    part = "transformer" if "transformer.r" in adapter else "unet"
    if f"{part}.r" not in adapter:
        raise ValueError(f"{source}: it does not say its rank and alpha; valid is what a run has written")
    rank, alpha = adapter[f"{part}.r"], float(adapter[f"{part}.lora_alpha"])
    if part == "transformer":
        kind = (adapter.get("transformer.auto_mapping") or {}).get("base_model_class")
        if kind not in TRANSFORMERS:
            raise ValueError(
                f"{source}: it is a LoRA of a {kind or 'transformer'}, for which kohya's names are not known here; valid is one of a UNet, "
                f"{' or '.join(TRANSFORMERS)}; diffusers reads this one as it is: load_lora_weights"
            )
        return _of_transformer(source, tensors, TRANSFORMERS[kind], alpha), rank, alpha
    converted = convert_state_dict_to_kohya(tensors)
    return converted | {name: torch.tensor(alpha) for name in converted if name.endswith(".alpha")}, rank, alpha  # diffusers: alpha = rank


def _of_transformer(source: Path, tensors: dict[str, Tensor], lists: Mapping, alpha: float) -> dict[str, Tensor]:
    """The tensors of a transformer's LoRA under kohya's names. lists: of `TRANSFORMERS`."""
    halves = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    left = {name: tuple(tensors[f"{name}.lora_{half}.weight"] for half in "AB") for name in halves}
    converted = {}
    for own, number in sorted({tuple(name.split(".")[1:3]) for name in left}):
        theirs, layers = lists.get(own, ("", {}))
        for layer, joined in layers.items():
            given = {name: left.pop(f"transformer.{own}.{number}.{name}", None) for name in joined}
            if any(given.values()):
                converted |= _join(f"lora_unet_{theirs}_{number}_{layer}", given, joined, alpha)
    if left:
        raise ValueError(f"{source}: kohya's name for {min(left)} is not known here; valid is a LoRA of blocks alone")
    return converted


def _join(layer: str, given: dict[str, tuple[Tensor, Tensor] | None], joined: dict[str, int], alpha: float) -> dict[str, Tensor]:
    """down (n r, I) and up (O_1 + ... + O_n, n r) of a layer that joins n of diffusers', of which some have a LoRA:

    down = (down_1; ...; down_n),    up = blockdiag(up_1, ..., up_n),    alpha' = n alpha

    Those without one have zeros. Where SD3's text ends, diffusers has a modulation's scale first, and the published network its shift.
    """
    first = next(name for name, pair in given.items() if pair is not None)
    down, up = given[first]
    zeros = {name: (torch.zeros_like(down), up.new_zeros(len(up) // joined[first] * times, up.shape[1])) for name, times in joined.items()}
    downs, ups = zip(*(given[name] or zeros[name] for name in joined))
    if first == "norm1_context.linear" and len(up) == 2 * down.shape[1]:
        ups = (torch.cat(up.chunk(2)[::-1]),)
    return {
        f"{layer}.lora_down.weight": torch.cat(downs),
        f"{layer}.lora_up.weight": torch.block_diag(*ups),
        f"{layer}.alpha": torch.tensor(len(joined) * alpha),
    }


def main(argv: list[str] | None = None) -> None:
    """Runs a command line. A mistake is one line on standard error and exit code 2."""
    if argv is None:
        steady_streams()
    parser = argparse.ArgumentParser(prog="ddpo-fast kohya", description="A run's LoRA for ComfyUI, AUTOMATIC1111 and others.")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--output",
        type=typed_path,
        help="The .safetensors file to write. Default: <name of RUN_DIR>.safetensors, beside the LoRA's folder.",
    )
    args = parser.parse_args(argv)
    try:
        print(write_kohya(args.run_dir, args.output))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
