"""Full-size encoders and language models, as the paper uses them.

Plain fields of `VisionConfig` and `LLMConfig`, so that a recipe can be read
and changed without jax. Weights come from the published models that stand
above each entry; these numbers serve to plan a run before they are there, and
to check it. docs/models.md compares their sizes with the published ones.
"""

# Sizes. num_hidden_layers is the published depth, whichever layer is read;
# intermediate_size is the width of fc1, or of gate and up in a gated MLP.
_BASE = dict(
  hidden_size=768,
  intermediate_size=3072,
  num_hidden_layers=12,
  num_attention_heads=12,
)
_LARGE = dict(
  hidden_size=1024,
  intermediate_size=4096,
  num_hidden_layers=24,
  num_attention_heads=16,
)
_SO400M = dict(
  hidden_size=1152,
  intermediate_size=4304,
  num_hidden_layers=27,
  num_attention_heads=16,
)
_HUGE = dict(
  hidden_size=1280,
  intermediate_size=5120,
  num_hidden_layers=32,
  num_attention_heads=16,
)
# SigLIP 2's and DINOv2's giants share a width and a depth, and no more.
_GIANT_OPT = dict(
  hidden_size=1536,
  intermediate_size=6144,
  num_hidden_layers=40,
  num_attention_heads=16,
)
_GIANT_GATED = dict(
  hidden_size=1536,
  intermediate_size=4096,
  num_hidden_layers=40,
  num_attention_heads=24,
  gated_mlp=True,
)

_HALVES = dict(image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
_IMAGENET = dict(
  image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225)
)

# Families: what is read, and how. The penultimate block without a norm for
# those trained with text, the last one and its norm for the others.
_SIGLIP = dict(
  _HALVES,
  family="siglip",
  feature_layer=-2,
  final_norm=False,
  hidden_act="gelu_pytorch_tanh",
  layer_norm_eps=1e-6,
)
_CLIP = dict(
  image_mean=(0.48145466, 0.4578275, 0.40821073),
  image_std=(0.26862954, 0.26130258, 0.27577711),
  family="clip",
  class_token=True,
  patch_bias=False,
  pre_norm=True,
  feature_layer=-2,
  final_norm=False,
  hidden_act="quick_gelu",
  layer_norm_eps=1e-5,
)
# Hugging Face's copies of MAE and of supervised ViT say 1e-12; the paper runs
# timm's, with 1e-6.
_PLAIN = dict(
  class_token=True,
  feature_layer=-1,
  final_norm=True,
  hidden_act="gelu",
  layer_norm_eps=1e-6,
)
_DINOV2 = dict(_PLAIN, **_IMAGENET, family="dinov2", layer_scale=True)
_MAE = dict(_PLAIN, **_IMAGENET, family="vit_mae")
_MOCO_V3 = dict(_PLAIN, **_IMAGENET, family="vit")
_SUPERVISED = dict(_PLAIN, **_HALVES, family="vit")


def _encoder(name, family, size, patch_size, *image_sizes):
  """Return one entry per image size, named by it."""
  return {
    f"{name}-{image_size}": dict(
      family, **size, patch_size=patch_size, image_size=image_size
    )
    for image_size in image_sizes
  }


VISION = {
  # google/siglip-base-patch16-{224,256,384,512}
  **_encoder("siglip-b16", _SIGLIP, _BASE, 16, 224, 256, 384, 512),
  # google/siglip-large-patch16-{256,384}
  **_encoder("siglip-l16", _SIGLIP, _LARGE, 16, 256, 384),
  # google/siglip-so400m-patch14-{224,384}; at 384 there are 27 x 27 patches
  # and six pixels are cut
  **_encoder("siglip-so400m14", _SIGLIP, _SO400M, 14, 224, 384),
  # google/siglip2-base-patch16-{224,256,384,512}
  **_encoder("siglip2-b16", _SIGLIP, _BASE, 16, 224, 256, 384, 512),
  # google/siglip2-large-patch16-{256,384,512}
  **_encoder("siglip2-l16", _SIGLIP, _LARGE, 16, 256, 384, 512),
  # google/siglip2-so400m-patch14-{224,384}
  **_encoder("siglip2-so400m14", _SIGLIP, _SO400M, 14, 224, 384),
  # google/siglip2-so400m-patch16-{256,384,512}
  **_encoder("siglip2-so400m16", _SIGLIP, _SO400M, 16, 256, 384, 512),
  # google/siglip2-giant-opt-patch16-{256,384}
  **_encoder("siglip2-gopt16", _SIGLIP, _GIANT_OPT, 16, 256, 384),
  # openai/clip-vit-large-patch14 and openai/clip-vit-large-patch14-336
  **_encoder("clip-l14", _CLIP, _LARGE, 14, 224, 336),
  # facebook/dinov2-base, -large and -giant; the paper reads the giant at less
  # than 518 pixels, its table of positions interpolated
  **_encoder("dinov2-b14", _DINOV2, _BASE, 14, 518),
  **_encoder("dinov2-l14", _DINOV2, _LARGE, 14, 518),
  **_encoder("dinov2-g14", _DINOV2, _GIANT_GATED, 14, 518, 378, 336),
  # facebook/vit-mae-base, -large and -huge
  **_encoder("mae-b16", _MAE, _BASE, 16, 224),
  **_encoder("mae-l16", _MAE, _LARGE, 16, 224),
  **_encoder("mae-h14", _MAE, _HUGE, 14, 224),
  # vit-b-300ep of facebookresearch/moco-v3
  **_encoder("moco-v3-b16", _MOCO_V3, _BASE, 16, 224),
  # google/vit-{base-patch16,large-patch16,huge-patch14}-224-in21k
  **_encoder("vit-b16-in21k", _SUPERVISED, _BASE, 16, 224),
  **_encoder("vit-l16-in21k", _SUPERVISED, _LARGE, 16, 224),
  **_encoder("vit-h14-in21k", _SUPERVISED, _HUGE, 14, 224),
}

# The small models share input and output embeddings; the others have two
# tables, and more rows in them.
_TIED = dict(
  vocab_size=151936,
  rope_theta=1e6,
  rms_norm_eps=1e-6,
  tie_word_embeddings=True,
)
_UNTIED = dict(_TIED, vocab_size=152064, tie_word_embeddings=False)

LLM = {
  # Qwen/Qwen2.5-0.5B-Instruct
  "qwen2.5-0.5b": dict(
    _TIED,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    head_dim=64,
  ),
  # Qwen/Qwen2.5-1.5B-Instruct
  "qwen2.5-1.5b": dict(
    _TIED,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    head_dim=128,
  ),
  # Qwen/Qwen2.5-3B-Instruct
  "qwen2.5-3b": dict(
    _TIED,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=128,
  ),
  # Qwen/Qwen2.5-7B-Instruct
  "qwen2.5-7b": dict(
    _UNTIED,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=128,
  ),
  # Qwen/Qwen2.5-14B-Instruct
  "qwen2.5-14b": dict(
    _UNTIED,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=48,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
  ),
  # Qwen/Qwen2.5-32B-Instruct
  "qwen2.5-32b": dict(
    _UNTIED,
    hidden_size=5120,
    intermediate_size=27648,
    num_hidden_layers=64,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
  ),
  # Qwen/Qwen2.5-72B-Instruct
  "qwen2.5-72b": dict(
    _UNTIED,
    hidden_size=8192,
    intermediate_size=29568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
  ),
}
