"""Models by name: variants of weights, what the hub or its absence says, files that may not be read."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from ddpo_fast.pipelines import hub
from ddpo_fast.pipelines.folders import find_model, open_pipeline
from ddpo_fast.pipelines.hub import choose_weights, local_folder
from ddpo_fast.scoring.pretrained import load_model

try:
    import httpx2 as httpx  # what huggingface_hub asks with from version 2 on
except ImportError:
    import httpx

OPTION = "model.path=m"
UNET = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    "files, wanted, chosen",
    [
        (["{s}.safetensors", "{s}.fp16.safetensors"], None, None),
        (["{s}.safetensors", "{s}.fp16.safetensors"], "fp16", "fp16"),
        (["{s}.safetensors"], "fp16", None),
        (["{s}.fp16.safetensors", "{s}.bin"], None, "fp16"),
        (["{s}.non_ema.safetensors"], None, "non_ema"),
        (["{s}.fp16-00001-of-00002.safetensors", "{s}.fp16-00002-of-00002.safetensors", "{s}.safetensors.index.fp16.json"], None, "fp16"),
        (["{s}-00001-of-00002.fp16.safetensors", "{s}.safetensors.index.fp16.json"], None, "fp16"),
        (["{s}-00001-of-00002.safetensors", "{s}.safetensors.index.json", "{s}.fp16.safetensors"], None, None),
        (["{s}.safetensors.index.json", "{s}.fp16.safetensors"], None, "fp16"),  # the index alone, as a download of *.json leaves it
    ],
)
@pytest.mark.parametrize("part, stem", [("unet", UNET), ("text_encoder", "model"), ("", UNET)])
def test_the_plain_weights_or_the_only_variant(files, wanted, chosen, part, stem):
    names = [f"{part}/{name}".lstrip("/").format(s=stem) for name in files]
    variant, found = choose_weights(OPTION, [*names, "other/model.bf16.safetensors", f"{part}/config.json"], part, stem, wanted)
    assert variant == chosen and found and set(found) <= set(names)
    assert all((chosen or "") in name and (chosen is not None or "fp16" not in name) for name in found)


@pytest.mark.parametrize(
    "files, wanted, message",
    [
        ([], None, "its unet/ has no weights; valid is diffusion_pytorch_model.safetensors, or a variant such as "),
        (["model.safetensors"], None, "its unet/ has no weights"),
        (
            ["{s}.bin"],
            None,
            "its unet/ has its weights as diffusion_pytorch_model.bin, a pickle, which runs code when it is loaded; valid is",
        ),
        (["{s}.ckpt"], "fp16", "diffusion_pytorch_model.ckpt, a pickle"),
        (["{s}.fp16.safetensors", "{s}.ema.safetensors"], None, "variants ema, fp16 alone; model.variant=null: valid is one of them"),
        (["{s}.fp16.safetensors"], "bf16", "variants fp16 alone; model.variant=bf16: valid is one of them"),
    ],
)
def test_weights_that_are_not_there_or_not_clear_name_the_folder(files, wanted, message):
    names = [f"unet/{name}".format(s=UNET) for name in files]
    with pytest.raises(ValueError, match=f"^{OPTION}: .*{re.escape(message)}[^\n]*$"):
        choose_weights(OPTION, names, "unet", UNET, wanted)


def to_variant(folder: Path, parts: tuple[str, ...], variant: str = "fp16") -> None:
    """Half-precision weights under the variant's name in place of the plain ones."""
    for path in [path for part in parts for path in (folder / part).glob("*.safetensors")]:
        tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(tensors, path.with_suffix(f".{variant}.safetensors"), metadata={"format": "pt"})
        path.unlink()


@pytest.mark.parametrize("parts", [("unet", "vae", "text_encoder"), ("vae",), ("text_encoder",)])
def test_a_folder_of_variants_is_opened_and_says_so(tiny_model, tmp_path, parts):
    """All of it, or some parts; also as model.vae."""
    path = shutil.copytree(tiny_model, tmp_path / "m")
    to_variant(path, parts)
    model, plain = find_model(str(path)), open_pipeline(find_model(str(tiny_model)), torch.float32)
    assert model.notes == [f"model.path={path}: weights of a variant are read for " + ", ".join(f"{part} (fp16)" for part in parts)]
    vae = find_model(str(tiny_model), vae=str(path / "vae")) if "vae" in parts else model
    for pipe in (open_pipeline(model, torch.float32), open_pipeline(vae, torch.float32)):
        for part in ("unet", "vae", "text_encoder"):
            for one, other in zip(getattr(pipe, part).parameters(), getattr(plain, part).parameters(), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    if "unet" not in parts:
        with pytest.raises(ValueError, match="^model.variant=bf16: |model.variant=bf16: valid is one of them$"):
            find_model(str(path), variant="bf16")


def test_a_rewards_model_of_a_variant(tmp_path):
    from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(
        CLIPConfig(
            text_config=CLIPTextConfig(**small, vocab_size=9).to_dict(),
            vision_config=CLIPVisionConfig(**small, image_size=8, patch_size=4).to_dict(),
            projection_dim=4,
        )
    )
    model.save_pretrained(tmp_path, variant="fp16")
    loaded = load_model(CLIPModel, str(tmp_path), "reward.kwargs.model", "a CLIP", "fp32")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    (tmp_path / "model.fp16.safetensors").rename(tmp_path / "model.msgpack")
    with pytest.raises(ValueError, match=f"^reward.kwargs.model={tmp_path}: it has no weights; [^\n]*; valid is a CLIP$"):
        load_model(CLIPModel, str(tmp_path), "reward.kwargs.model", "a CLIP", "fp32")


def hub_error(kind: type, status: int) -> HfHubHTTPError:
    request = httpx.Request("GET", "https://hub/api/models/a/b")
    return kind("no\nway", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    "error, offline, message",
    [
        (hub_error(GatedRepoError, 403), False, r"accepted its licence, .*`hf auth login`, or HF_TOKEN"),
        (hub_error(RepositoryNotFoundError, 401), False, "no such public model on the hub; a private one .*`hf auth login`, or HF_TOKEN"),
        (hub_error(HfHubHTTPError, 403), False, "`hf auth login`"),
        (LocalEntryNotFoundError("offline"), True, r"not in the hub's cache, and the offline mode \(HF_HUB_OFFLINE=1\) keeps the hub from"),
        (OfflineModeIsEnabled("offline"), True, "offline mode"),
        (
            httpx.ConnectError("[Errno -2] Name or service not known"),
            False,
            "there is no such folder, .* the hub cannot be asked: ConnectError",
        ),
        (httpx.ReadTimeout("slow"), False, "the hub cannot be asked: ReadTimeout: slow"),
        (hub_error(HfHubHTTPError, 500), False, "the hub cannot be asked: HfHubHTTPError: no way"),
    ],
)
def test_what_the_hub_says_is_one_line_with_what_to_do(monkeypatch, tmp_path, error, offline, message):
    """For a model, its configs, a VAE and a reward's model; also where a library wraps it."""

    def refuse(*args, **kwargs):
        try:
            raise error
        except Exception:
            raise OSError("a/b does not appear to have a file named config.json") from error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    for option, find in (
        ("model.path", lambda: find_model("a/b")),
        ("model.config", lambda: find_model("x.safetensors", config="a/b")),
        ("model.vae", lambda: local_folder("model.vae", "a/b")),
        ("reward.kwargs.model", lambda: load_model(CLIPModel, "a/b", "reward.kwargs.model", "a CLIP", "fp32")),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(option)}=a/b: [^\n]*{message}[^\n]*$"):
            find()


def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(monkeypatch, tmp_path):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", None)
    with pytest.raises(ValueError, match="^model.path=models/sd15: there is no such folder: .*models"):
        find_model("models/sd15")


def test_a_cached_model_is_one_of_the_hub_even_beside_such_a_folder(monkeypatch, tmp_path, tiny_model):
    (tmp_path / "models").mkdir()
    (tmp_path / "cache" / "models--models--sd15").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda source, allow_patterns: asked.append(allow_patterns) or str(tiny_model))
    monkeypatch.setattr(
        hub.HfApi, "list_repo_files", lambda self, source: [str(p.relative_to(tiny_model)) for p in tiny_model.rglob("*.*")]
    )
    open_pipeline(find_model("models/sd15"), torch.float32)
    assert [[name for name in patterns if "safetensors" in name] for patterns in asked] == [
        [], ["unet/diffusion_pytorch_model.safetensors"], ["vae/diffusion_pytorch_model.safetensors"], ["text_encoder/model.safetensors"]
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "unet/config.json"])
def test_a_file_that_may_not_be_read_says_so(monkeypatch, tiny_model, name):
    """The superuser may read all, so the system's answers are stood in for."""
    access, read = os.access, Path.read_text
    monkeypatch.setattr(os, "access", lambda path, mode, **kwargs: not str(path).endswith(name) and access(path, mode, **kwargs))

    def read_text(path, **kwargs):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(ValueError, match=f"^model.path={tiny_model}: {name} cannot be read: Permission denied$"):
        find_model(str(tiny_model))


def test_the_documents_line_converts_pickles(tiny_model, tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    code = re.search(r'python -c "(.*)"\n', text)[1].replace("FOLDER", str(tmp_path / "m"))
    path = shutil.copytree(tiny_model, tmp_path / "m")
    for part, name in (("unet", UNET), ("vae", UNET), ("text_encoder", "pytorch_model")):
        (file,) = (path / part).glob("*.safetensors")
        torch.save(load_file(file), path / part / f"{name}.bin")
        file.unlink()
    with pytest.raises(ValueError, match="its unet/ has its weights as diffusion_pytorch_model.bin, a pickle"):
        find_model(str(path))
    exec(code, {})
    converted, plain = find_model(str(path) + "-safetensors"), find_model(str(tiny_model))
    for one, other in zip(open_pipeline(converted, torch.float32).unet.parameters(), open_pipeline(plain, torch.float32).unet.parameters()):
        assert torch.equal(one, other)


def test_configs_alone_in_the_cache_say_that_the_hub_cannot_be_asked(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr(hub.HfApi, "list_repo_files", unreachable)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="^model.path=org/name: the hub's cache has its configs but no weights, and the hub cannot be ask"):
        hub.file_names("model.path", "org/name", tmp_path)
    (tmp_path / "unet" / f"{UNET}.safetensors").write_bytes(b"")
    assert f"unet/{UNET}.safetensors" in hub.file_names("model.path", "org/name", tmp_path)
