"""The tiny pipelines of the families: plain diffusers loads them and draws the same pictures, in which all that they are given matters."""

import pytest
import torch
from diffusers import DiffusionPipeline
from families import CALL, FAMILIES, OTHERS, make_family


def pictures(pipeline: DiffusionPipeline, name: str, prompts: list[str]) -> torch.Tensor:
    """Of two steps, all from the same noise."""
    given = CALL[name] | {key: [CALL[name][key]] * len(prompts) for key in ("negative_prompt",) if key in CALL[name]}
    pipeline.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(0) for _ in prompts]
    return torch.as_tensor(pipeline(prompt=list(prompts), num_inference_steps=2, generator=noise, output_type="pt", **given)[0])


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_a_family_s_folder_is_a_pipeline_of_diffusers(family, tmp_path, name):
    folder = family(name)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 3e6 and not list(folder.rglob("*.bin"))
    loaded = (DiffusionPipeline.from_pretrained(path) for path in (folder, make_family(name, tmp_path)))
    drawn, again = (pictures(pipeline, name, ["a cat", "a dog"]) for pipeline in loaded)
    assert torch.equal(drawn, again) and drawn.isfinite().all() and drawn[0].std() > 0.05
    assert (drawn[0] - drawn[1]).std() > 1e-4
