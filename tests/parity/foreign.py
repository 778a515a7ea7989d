"""Random torch models, as transformers builds, runs and saves them.

Biases and norms carry noise, since fresh ones (zero, one) hide a lost or a
swapped tensor; matrices are scaled up, since small ones hide a wrong theta or
activation. Image embeddings are kept small, since LayerNorm's epsilon shows
only against a small variance.
"""

import json
import re

import jax
import numpy as np
import torch
import transformers
from transformers import image_utils

from pivot_jax.models import mllm
from pivot_jax.weights.convert import names, safetensor_files

TOLERANCE = 5e-6  # float32, absolute, outputs of order one
MISS = 10 * TOLERANCE  # what a wrong model must differ by at least
IMAGE = 60  # the vocabulary entry that stands for a patch
VISION = dict(
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  image_size=28,
  patch_size=8,
)
LLM = dict(
  vocab_size=61,
  hidden_size=48,
  intermediate_size=56,
  num_hidden_layers=3,
  num_attention_heads=6,
  num_key_value_heads=2,
  max_position_embeddings=64,
  rope_parameters=dict(rope_type="default", rope_theta=1e6),
)
# Mean and standard deviation, from transformers and not from here.
HALF = (image_utils.IMAGENET_STANDARD_MEAN, image_utils.IMAGENET_STANDARD_STD)
IMAGENET = (image_utils.IMAGENET_DEFAULT_MEAN, image_utils.IMAGENET_DEFAULT_STD)
CLIP = (image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD)


def roughen(model, seed, *, embeddings=0.03, matrices=1.0):
  """Put noise on the vectors and scales the matrices, in place.

  `embeddings` is the scale of the image embeddings, `matrices` that of the
  blocks. What has no gradient, a fixed table of positions, stays as it is.
  """
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, x in model.named_parameters():
      if not x.requires_grad:
        continue
      noise = torch.randn(x.shape, generator=generator)
      if name.endswith("lambda1"):
        x.copy_(noise.sigmoid())
      elif "embeddings." in name:
        # A patch of another size is a sum over more or fewer pixels.
        fan = x[0].numel() / 192 if x.ndim == 4 else 1
        x.copy_((embeddings if x.ndim > 1 else embeddings / 3) * noise)
        x.div_(fan**0.5)
      elif x.ndim == 1:
        x.add_(0.1 * noise)
      elif "embed_tokens" in name or "lm_head" in name:
        x.copy_(0.12 * noise * (48 / x.shape[1]) ** 0.5)
      else:
        x.copy_(matrices * noise * x.shape[1] ** -0.5)
  return model.eval()


def pixels(images, statistics=HALF):
  """Pixel values as image processors make them from [N, H, W, 3] of 0..255."""
  if not isinstance(images, torch.Tensor):
    images = torch.tensor(np.asarray(images))
  mean, std = (torch.tensor(x) for x in statistics)
  return ((images / 255 - mean) / std).permute(0, 3, 1, 2)


def images(count, seed=0, size=28):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def siglip(**sizes):
  """SigLIP 1 and 2 of a fixed resolution: one class."""
  return transformers.SiglipVisionModel(
    transformers.SiglipVisionConfig(**VISION | sizes, vision_use_head=False)
  )


def clip(**sizes):
  return transformers.CLIPVisionModel(
    transformers.CLIPVisionConfig(**VISION | sizes)
  )


def dinov2(**sizes):
  """Its MLP is `mlp_ratio` times as wide, the gated one two thirds of that."""
  sizes = VISION | sizes
  del sizes["intermediate_size"]
  return transformers.Dinov2Model(transformers.Dinov2Config(**sizes))


def mae(**sizes):
  """Every patch is kept; fixed positions, of columns and then of rows."""
  config = transformers.ViTMAEConfig(**VISION | sizes, mask_ratio=0.0)
  model = transformers.ViTMAEModel(config)
  _fix_positions(model, lambda down, across: (across, down))
  return model


def vit(**sizes):
  return transformers.ViTModel(
    transformers.ViTConfig(**VISION | sizes), add_pooling_layer=False
  )


def moco(**sizes):
  """A ViT with MoCo-v3's epsilon and fixed positions, rows and then columns."""
  model = vit(layer_norm_eps=1e-6, **sizes)
  _fix_positions(model, lambda down, across: (down, across))
  return model


def _fix_positions(model, order):
  """Sines and cosines of a patch's place along both sides; class token 0."""
  table = model.embeddings.position_embeddings.requires_grad_(False)
  side = model.config.image_size // model.config.patch_size
  quarter = model.config.hidden_size // 4
  omega = 10000.0 ** -(torch.arange(quarter) / quarter)
  angles = torch.arange(side)[:, None] * omega
  waves = torch.cat([angles.sin(), angles.cos()], 1)
  down, across = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
  table.zero_()
  table[0, 1:] = torch.cat(order(down, across), 1)


def qwen2(tied, **sizes):
  return transformers.Qwen2ForCausalLM(
    transformers.Qwen2Config(**LLM | sizes, tie_word_embeddings=tied)
  )


def llava(tower, strategy, tied):
  """A language model that reads a tower's penultimate block."""
  return transformers.LlavaForConditionalGeneration(
    transformers.LlavaConfig(
      vision_config=tower.config,
      text_config=transformers.Qwen2Config(**LLM, tie_word_embeddings=tied),
      image_token_index=IMAGE,
      vision_feature_layer=-2,
      vision_feature_select_strategy=strategy,
      tie_word_embeddings=tied,
    )
  )


def penultimate(model, pixels, batch):
  """All tokens before the last block."""
  return model(pixels, output_hidden_states=True).hidden_states[-2]


def penultimate_patches(model, pixels, batch):
  return penultimate(model, pixels, batch)[:, 1:]


def last_patches(model, pixels, batch):
  """The patches after the last block and its norm."""
  return model(pixels).last_hidden_state[:, 1:]


def last_mae_patches(model, pixels, batch):
  side = model.config.image_size // model.config.patch_size
  # MAE sorts its patches by this noise.
  noise = torch.arange(side**2).repeat(len(pixels), 1)
  return model(pixels, noise=noise).last_hidden_state[:, 1:]


def interpolated_patches(model, pixels, batch, side):
  """The patches, interpolated to `side` x `side` as the paper's code does."""
  x = last_patches(model, pixels, batch)
  old = int(x.shape[1] ** 0.5)
  x = torch.nn.functional.interpolate(
    x.mT.reshape(len(x), -1, old, old),
    size=(side, side),
    mode="bilinear",
    align_corners=False,
  )
  return x.flatten(2).mT


def text_logits(model, pixels, batch):
  """Logits, zero in the padding."""
  return _valid(model(**_tokens(batch)).logits, batch)


def image_logits(model, pixels, batch):
  """Logits of a prompt with an image, zero in the padding."""
  return _valid(model(**_tokens(batch), pixel_values=pixels).logits, batch)


def _tokens(batch):
  ids = np.where(batch.image_index >= 0, IMAGE, batch.tokens)
  return dict(
    input_ids=torch.tensor(ids).long(),
    attention_mask=torch.tensor(np.asarray(batch.segments)),
  )


def _valid(logits, batch):
  valid = torch.tensor(np.asarray(batch.segments)) > 0
  return torch.where(valid[..., None], logits, 0)


def save(model, folder):
  model.save_pretrained(folder)


def save_with_statistics(model, folder):
  """Beside the weights a processor with ImageNet's statistics."""
  mean, std = IMAGENET
  side = model.config.image_size
  save(model, folder)
  transformers.ViTImageProcessor(
    size=dict(height=side, width=side), image_mean=mean, image_std=std
  ).save_pretrained(folder)


def save_official(model, folder):
  """Write a Llava in the layout of LLaVA-NeXT and of the paper's code.

  The tower stands under two prefixes and lacks the block behind its features;
  whole, and with its config.json, it is in a folder of its own.
  """
  blocks = model.config.vision_config.num_hidden_layers
  last = f"encoder.layers.{blocks - 1}."
  renamed = (
    (
      r"model\.vision_tower\.(?:vision_model\.)?(.+)",
      r"model.vision_tower.vision_tower.vision_model.\1",
    ),
    (r"model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"model\.language_model\.", "model."),
  )
  arrays = {}
  for name, tensor in model.state_dict().items():
    for old, new in renamed:
      name = re.sub(f"^{old}", new, name)
    if last not in name:
      arrays[name] = tensor.numpy()
  safetensor_files.write(folder, arrays)
  model.model.vision_tower.save_pretrained(folder / "tower")
  config = json.loads(
    model.config.text_config.to_json_string(use_diff=False)
  ) | dict(
    model_type="llava_qwen",
    mm_vision_tower="tower",
    mm_projector_type="mlp2x_gelu",
    mm_vision_select_layer=-2,
    mm_vision_select_feature="patch",
  )
  safetensor_files.write_json(folder / "config.json", config)


def whole_vision(folder, config):
  """Our params of a vision folder under another config of the same model."""
  stored = safetensor_files.contents(folder)
  shapes = jax.eval_shape(
    lambda: mllm.init_params(mllm.MLLM(None, config), jax.random.key(0))
  )

  def read(group):
    keys = [name.removeprefix("vision.") for name in group]
    found = safetensor_files.read(stored, keys)
    return dict(zip(group, found.values(), strict=True))

  return names.from_foreign(shapes, read)


def loaded_without_loss(cls, folder):
  """The transformers model of a folder; fails on missing or unread tensors."""
  model, report = cls.from_pretrained(folder, output_loading_info=True)
  assert not any(report.values()), report
  return model.eval()


def difference(a, b):
  return float(np.abs(np.asarray(a) - np.asarray(b)).max())


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
