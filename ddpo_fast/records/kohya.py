"""A run's LoRA as one file in kohya's format, which ComfyUI, AUTOMATIC1111 and others read.  ddpo-fast kohya RUN_DIR"""

import argparse
import json
from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ddpo_fast.files import new_file
from ddpo_fast.places import NETWORKS, lora_file, typed_path
from ddpo_fast.terminal import steady_streams


def write_kohya(run_dir: Path, output: Path | None = None) -> Path:
    """Writes <run_dir>/lora, or the LoRA in run_dir itself, under kohya's names: for a layer a.b.0.c of the UNet

    lora_unet_a_b_0_c.lora_down.weight (r, I) or (r, I, k, k), .lora_up.weight (O, r) or (O, r, 1, 1) and .alpha, a scalar. They add
    alpha / r up down to the layer's weight. Returns the file, by default <name of run_dir>.safetensors beside the LoRA's folder. Raises
    ValueError if there is no LoRA yet, or one of a transformer.
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
    if "transformer.r" in adapter:
        raise ValueError(f"{source}: it is a LoRA of a transformer, for which kohya's names are not known here; valid is one of a UNet")
    if "unet.r" not in adapter:
        raise ValueError(f"{source}: it does not say its rank and alpha; valid is what a run has written")
    rank, alpha = adapter["unet.r"], float(adapter["unet.lora_alpha"])
    converted = convert_state_dict_to_kohya(tensors)
    converted |= {name: torch.tensor(alpha) for name in converted if name.endswith(".alpha")}  # diffusers has put the rank there
    metadata = {
        "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha), "ss_output_name": output.stem,
    }  # fmt: skip
    try:
        with new_file(output) as partial:
            save_file(converted, partial, metadata)
    except SafetensorError as error:
        raise ValueError(f"--output={output}: cannot be written: {error}") from None
    return output


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
