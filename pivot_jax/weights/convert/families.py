"""What the families of vision encoders are, whoever wrote the file.

Sizes are a model's own; these choices every published model of a family shares.
"""

from collections.abc import Mapping
from typing import Any

_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = (
  (0.48145466, 0.4578275, 0.40821073),
  (0.26862954, 0.26130258, 0.27577711),
)
# The paper reads these after the last block and its norm (paper.md 1.4).
_LAST = dict(class_token=True, feature_layer=-1, final_norm=True)


def _family(statistics, **choices: Any) -> dict[str, Any]:
  mean, std = statistics
  return dict(image_mean=mean, image_std=std, **choices)


# Fields of VisionConfig. The statistics are those of images where no file says;
# the epsilon of a ViT is timm's, Hugging Face's files have their own.
CHOICES: Mapping[str, Mapping[str, Any]] = {
  "siglip": _family(_HALF, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
  "clip": _family(
    _CLIP,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    class_token=True,
    patch_bias=False,
    pre_norm=True,
  ),
  "dinov2": _family(
    IMAGENET,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    layer_scale=True,
    **_LAST,
  ),
  "vit": _family(_HALF, hidden_act="gelu", layer_norm_eps=1e-6, **_LAST),
  "vit_mae": _family(IMAGENET, hidden_act="gelu", layer_norm_eps=1e-6, **_LAST),
}
# Blocks of the published SigLIP encoders, by width.
SIGLIP_DEPTHS: Mapping[int, int] = {768: 12, 1024: 24, 1152: 27, 1536: 40}
# Attention heads of the published encoders, by family and width.
HEADS: Mapping[str, Mapping[int, int]] = {
  "siglip": {768: 12, 1024: 16, 1152: 16, 1536: 16},
  "clip": {768: 12, 1024: 16, 1280: 16},
  "dinov2": {384: 6, 768: 12, 1024: 16, 1536: 24},
  "vit": {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16},
  "vit_mae": {768: 12, 1024: 16, 1280: 16},
}
