"""Build the pictures the embedded model is trained on: emoji of five permissively licensed sets, with their names.

    python -m ddpo_fast.embedded.build_data [--packages FOLDER] [--all-pictures FILE.npz]

Packages come from `npm pack NAME@VERSION` (or, with --packages, from a folder of such .tgz files). SVGs are drawn with
CairoSVG, which is needed here only: the result is shipped in `data/`, and training reads nothing else.
  data/train.png      64x64 RGB pictures on white, GRID_COLUMNS a row, of the training styles
  data/heldout.png    the same for the style that the scorer is tested on; nothing is trained on it
  data/pictures.json  {"train"|"heldout": [[subject, style, emoji key], ...] in sheet order, "words": [...]}
--all-pictures also writes every picture of the training styles (skin tones and flags left out): what the VAE learns from.
"""

import argparse
import importlib.util
import json
import multiprocessing
import subprocess
import tarfile
import tempfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from ddpo_fast.embedded.vocabulary import ANIMALS, EMOJI_KEYS, SUBJECTS

PACKAGES = {  # style -> npm package and version; licences are in NOTICE
    "noto": ("@iconify-json/noto", "1.2.9"),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5"),
    "fluent-3d": ("@lobehub/fluent-emoji-3d", "1.1.0"),
    "fluent-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
}
HELDOUT_STYLE = "fluent-flat"
SIZE = 64  # pixels a side
MARGIN = 2  # white pixels on each side of the drawing
GRID_COLUMNS = 20
DATA = Path(__file__).parent / "data"


def fetch(style: str, folder: Path) -> tarfile.TarFile:
    """Open the package of `style`, taken from `folder` or put there by `npm pack`."""
    name, version = PACKAGES[style]
    archive = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", f"{name}@{version}"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return tarfile.open(archive)


def read_svgs(style: str, folder: Path) -> dict[str, bytes]:
    """Key -> standalone SVG of an Iconify package; aliases are resolved, so that each drawing has one key."""
    with fetch(style, folder) as tar:
        icons = json.load(tar.extractfile("package/icons.json"))
    svgs = {}
    for key, icon in icons["icons"].items():
        width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        svgs[key] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        ).encode()
    return svgs


def read_webps(style: str, folder: Path) -> dict[str, bytes]:
    """Key -> WebP file of the 3D set, whose files are named by code point; noto's table gives the keys."""
    with fetch("noto", folder) as tar:
        keys = json.load(tar.extractfile("package/chars.json"))
    with fetch(style, folder) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.name.endswith(".webp")}
    by_code = {Path(name).stem.replace("-fe0f", ""): data for name, data in files.items()}
    return {key: by_code[code] for code, key in keys.items() if code in by_code}


def draw(source: bytes) -> np.ndarray:
    """SVG or WebP -> (SIZE, SIZE, 3) uint8 RGB on white."""
    if source.startswith(b"<svg"):
        import cairosvg

        source = cairosvg.svg2png(source, output_width=256, output_height=256)
    rgba = cv2.imdecode(np.frombuffer(source, np.uint8), cv2.IMREAD_UNCHANGED).astype(np.float32)
    alpha = rgba[..., 3:] / 255
    flat = rgba[..., 2::-1] * alpha + 255 * (1 - alpha)
    inner = SIZE - 2 * MARGIN
    small = cv2.resize(flat, (inner, inner), interpolation=cv2.INTER_AREA)
    small = cv2.copyMakeBorder(small, *[MARGIN] * 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    return np.clip(small + 0.5, 0, 255).astype(np.uint8)


def write_sheet(path: Path, pictures: list[np.ndarray]) -> None:
    """Write pictures (SIZE, SIZE, 3) row by row as one PNG, the rest of the last row white."""
    rows = -(-len(pictures) // GRID_COLUMNS)
    padded = np.full((rows * GRID_COLUMNS, SIZE, SIZE, 3), 255, np.uint8)
    padded[: len(pictures)] = pictures
    sheet = padded.reshape(rows, GRID_COLUMNS, SIZE, SIZE, 3).swapaxes(1, 2).reshape(rows * SIZE, -1, 3)
    Image.fromarray(sheet).save(path, optimize=True)


def read_sheet(split: str) -> tuple[np.ndarray, list[str], list[str]]:
    """The shipped pictures of `split` ("train" or "heldout"): (N, SIZE, SIZE, 3) uint8 RGB, subjects, styles."""
    rows = json.loads((DATA / "pictures.json").read_text())[split]
    sheet = cv2.cvtColor(cv2.imread(str(DATA / f"{split}.png")), cv2.COLOR_BGR2RGB)
    tiles = sheet.reshape(-1, SIZE, GRID_COLUMNS, SIZE, 3).swapaxes(1, 2).reshape(-1, SIZE, SIZE, 3)
    return tiles[: len(rows)], [row[0] for row in rows], [row[1] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder of npm packages (.tgz); missing ones are fetched into it")
    parser.add_argument("--all-pictures", type=Path, help="also write every picture of the training styles to this .npz")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw")
    args = parser.parse_args()
    if importlib.util.find_spec("cairosvg") is None:
        raise SystemExit("build_data draws SVG files with CairoSVG: pip install cairosvg (training does not need it)")
    folder = args.packages or Path(tempfile.mkdtemp(prefix="emoji-"))
    folder.mkdir(parents=True, exist_ok=True)
    DATA.mkdir(exist_ok=True)

    jobs, words = {"train": [], "heldout": [], "all": []}, set()
    for style in PACKAGES:
        sources = read_webps(style, folder) if style == "fluent-3d" else read_svgs(style, folder)
        split = "heldout" if style == HELDOUT_STYLE else "train"
        for subject in SUBJECTS:
            found = [key for key in EMOJI_KEYS.get(subject, (subject.replace(" ", "-"),)) if key in sources]
            jobs[split] += [(subject, style, key, sources[key]) for key in found]
            if split == "train" and not found and subject in ANIMALS:
                print(f"{style} has no {subject}")
        plain = [key for key in sources if not any(part in key for part in ("skin-tone", "flag-for", "flag-"))]
        words.update(word for key in plain for word in key.split("-") if word.isalpha())
        if split == "train" and args.all_pictures:
            jobs["all"] += [(None, style, key, sources[key]) for key in plain]

    pictures = {}
    with multiprocessing.Pool(args.workers) as pool:
        for split, rows in jobs.items():
            drawn = pool.imap(draw, [row[3] for row in rows], chunksize=16)
            pictures[split] = list(tqdm(drawn, split, total=len(rows)))
    for split in ("train", "heldout"):
        write_sheet(DATA / f"{split}.png", pictures[split])
    index = {split: [row[:3] for row in jobs[split]] for split in ("train", "heldout")} | {"words": sorted(words)}
    (DATA / "pictures.json").write_text(json.dumps(index, separators=(",", ":")).replace('],["', '],\n["') + "\n")
    if args.all_pictures:
        np.savez_compressed(args.all_pictures, pictures=np.stack(pictures["all"]))
    for split in ("train", "heldout"):
        size_kib = (DATA / f"{split}.png").stat().st_size / 1024
        print(f"{split}: {len(pictures[split])} pictures of {len({row[0] for row in jobs[split]})} subjects, {size_kib:.0f} KiB")


if __name__ == "__main__":
    main()
