"""Puts fused GroupNorm+SiLU and GEGLU into a diffusers UNet, and takes them out again.

A module keeps its parameters, its name and its place; only its class changes, to a subclass with another `forward`. So state_dict
keys stay, LoRA may be added before or after, and `unfuse` leaves nothing behind.
"""

from collections import Counter

from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ddpo_fast.networks.patch import patch, unpatch


class FusedGroupNorm(nn.GroupNorm):
    """A GroupNorm that applies `fused_ops.group_norm_silu`. If `fused_silu` is set, this includes the SiLU after it."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (B, C, H, W), or (B, C, L) in attention. Returns the same shape."""
        x = input.unsqueeze(3) if input.dim() == 3 else input
        y = self.fused_ops.group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, self.fused_silu)
        return y.squeeze(3) if input.dim() == 3 else y


class FusedGEGLU(GEGLU):
    """A GEGLU whose gate is `fused_ops.geglu`."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """(..., dim_in) to (..., dim_out)."""
        return self.fused_ops.geglu(self.proj(hidden_states))


class AppliedSiLU(nn.Module):
    """Replaces a SiLU after FusedGroupNorms, which have activated its feature maps already. It still activates a time embedding."""

    def __init__(self, original: nn.SiLU):
        super().__init__()
        self.original = original
        self.train(original.training)

    def forward(self, input: Tensor) -> Tensor:
        """Returns (B, C, H, W) as it is, and (B, E) activated."""
        return input if input.dim() == 4 else self.original(input)


def _silu_sites(unet: nn.Module) -> list[tuple[nn.Module, str, tuple[str, ...]]]:
    """Modules with a SiLU, the SiLU's attribute, and the GroupNorms that all feature maps leave directly before the SiLU."""
    sites = [
        (module, "nonlinearity", ("norm1", "norm2"))
        for module in unet.modules()
        if type(module) is ResnetBlock2D and module.time_embedding_norm == "default"
    ]
    if getattr(unet, "conv_norm_out", None) is not None:
        sites.append((unet, "conv_act", ("conv_norm_out",)))
    return sites


def fuse(unet: nn.Module, ops) -> dict[str, int]:
    """Makes a diffusers UNet2DConditionModel compute its GroupNorms, the SiLUs right after them and its GEGLUs with `ops`.

    A SiLU is fused only where it directly follows a GroupNorm: in residual blocks without scale and shift, and before the output
    convolution. Subclasses of GroupNorm or GEGLU are left alone, since they may compute something else.

    ops: an `Ops` of ddpo_fast.kernels (of which `group_norm_silu` and `geglu` are used). Returns how many modules of each kind are
    now fused: group_norm_silu, group_norm, geglu. Raises ValueError if the UNet is fused already.
    """
    if any(isinstance(module, (FusedGroupNorm, FusedGEGLU, AppliedSiLU)) for module in unet.modules()):
        raise ValueError("unet: it is fused already; unfuse it first")
    with_silu = set()
    for module, activation, norms in _silu_sites(unet):
        norms = [getattr(module, name) for name in norms]
        if type(getattr(module, activation)) is nn.SiLU and all(type(norm) is nn.GroupNorm for norm in norms):
            with_silu.update(norms)
            setattr(module, activation, AppliedSiLU(getattr(module, activation)))
    counts = Counter(group_norm_silu=0, group_norm=0, geglu=0)
    for module in unet.modules():
        if type(module) is nn.GroupNorm:
            patch(module, FusedGroupNorm, fused_ops=ops, fused_silu=module in with_silu)
            counts["group_norm_silu" if module.fused_silu else "group_norm"] += 1
        elif type(module) is GEGLU:
            patch(module, FusedGEGLU, fused_ops=ops)
            counts["geglu"] += 1
    return dict(counts)


def unfuse(unet: nn.Module) -> None:
    """Undoes `fuse`: classes, attributes and SiLU objects are the original ones again. A UNet that is not fused stays as it is.

    Raises ValueError if something else has changed a fused module since.
    """
    for module in list(unet.modules()):
        for kind in (FusedGroupNorm, FusedGEGLU):
            unpatch(module, kind)
        for name, child in list(module.named_children()):
            if type(child) is AppliedSiLU:
                setattr(module, name, child.original)
