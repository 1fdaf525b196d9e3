"""What people prefer: PickScore (arXiv:2305.01569)."""

from ddpo_fast.rewards.clip_score import ClipScore


class PickScore(ClipScore):
    """The logit of PickScore v1, near 20 for good pictures. It is a CLIP ViT-H/14 trained on which of two pictures people had picked."""

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = None,
        device: str = "auto",
        dtype: str = "fp32",
        batch_size: int = 32,
    ):
        """As for `ClipScore`, which is scaled here."""
        super().__init__(model, processor, True, device, dtype, batch_size)
