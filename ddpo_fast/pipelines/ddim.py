"""A diffusion model's scheduler as a DDIM scheduler whose steps all have a density."""

from collections.abc import Mapping

from diffusers import DDIMScheduler

SD_STEPS = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
"""How Stable Diffusion's scheduler_config.json places the timesteps."""


def ddim_scheduler(config: Mapping) -> DDIMScheduler:
    """The DDIM scheduler of a model, of the config of whatever sampler is saved with it: its betas, what it predicts, its `clip_sample`.

    Its timesteps are those that the config states, if each has a density: "leading" with an offset of 1 or more, or "trailing". Others
    have a step at t = 0, from where there is no way to go; "trailing" takes their place for betas rescaled to zero signal-to-noise, which
    begin at the last timestep, and Stable Diffusion's own do for the rest. The last step always ends at the noise of t = 0: one that
    ended at the picture would have no density. What a config does not state is as Stable Diffusion has it.
    """
    spacing, offset = (_stated(config, key) for key in ("timestep_spacing", "steps_offset"))
    if spacing not in ("leading", "trailing") or spacing == "leading" and offset < 1:
        spacing, offset = ("trailing" if config.get("rescale_betas_zero_snr", False) else "leading"), SD_STEPS["steps_offset"]
    steps = {"timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": False}
    return DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False), **steps)


def changed_steps(config: Mapping, ours: DDIMScheduler) -> dict[str, object]:
    """What `ours` has otherwise than a scheduler's config states, of the keys of `SD_STEPS`."""
    return {key: ours.config[key] for key in SD_STEPS if key in config and _stated(config, key) != ours.config[key]}


def _stated(config: Mapping, key: str) -> object:
    """A scheduler's own default is not what its model was made for, so it does not count."""
    return config[key] if key in config and key not in config.get("_use_default_values", ()) else SD_STEPS[key]
