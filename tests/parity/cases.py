"""The cases that are compared with transformers, and our reading of each.

A case is one architecture at one size. The tiny ones with every detail stand
here; those of a published width are in `report.py`. Running torch on them, and
computing them with a detail wrong, is `towers_test.py`'s business.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import pivot_jax
from pivot_jax import trees
from pivot_jax.models import layers, mllm
from tests.fixtures import tiny_models
from tests.parity import foreign

GRADIENT_TOLERANCE = 1e-5  # of the largest entry
_PROMPTS = (17, 13)  # tokens: the second row is padded


@dataclasses.dataclass(frozen=True)
class Case:
  """One architecture at one size.

  build: the torch model, whose weights are then made random. read: its output
    from (model, pixel values, batch). save: writes its folder.
  choices: behind our address of that folder.
  image_size: of the images that both read; 0 without images.
  embeddings, matrices: the scales of `foreign.roughen`; with these outputs are
    of order one and epsilons show.
  patches: of an image that stand in a prompt.
  layers: the hidden states that the folder can give.
  """

  name: str
  details: str
  build: Callable[[], torch.nn.Module]
  read: Callable[..., torch.Tensor]
  save: Callable[[Any, pathlib.Path], None] = foreign.save
  statistics: tuple = foreign.HALF
  choices: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  image_size: int = 28
  embeddings: float = 0.003
  matrices: float = 0.6
  patches: int = 0
  layers: tuple[int, ...] = (-1, -2, -3)
  tolerance: float = foreign.TOLERANCE

  def batch(self) -> tiny_models.Batch:
    """Two prompts, two images, or both."""
    found = tiny_models.prompts(
      _PROMPTS,
      width=max(_PROMPTS),
      patches=self.patches,
      vocab=foreign.IMAGE,
      image_size=self.image_size,
    )
    if not self.image_size:
      return found
    pictures = foreign.images(len(_PROMPTS), size=self.image_size)
    return found._replace(images=pictures[:, None])


@dataclasses.dataclass(frozen=True)
class Subject:
  """The folder of a case as we read it."""

  case: Case
  folder: pathlib.Path
  model: mllm.MLLM
  params: Any

  @functools.cached_property
  def batch(self) -> tiny_models.Batch:
    return self.case.batch()

  @functools.cached_property
  def leaves(self) -> dict[str, np.ndarray]:
    return trees.flatten(self.params)

  def outputs(self, **changes: Any) -> np.ndarray:
    """Features or logits with another `model`, `params` or `batch`."""
    given = dict(model=self.model, params=self.params, batch=self.batch)
    return np.asarray(_forward(*(given | changes).values()))

  def edited(self, leaves: Mapping[str, np.ndarray], **changes) -> np.ndarray:
    """Outputs with other leaves."""
    params = trees.unflatten(self.leaves | leaves)
    return self.outputs(params=params, **changes)

  def reopened(self, **choices: Any) -> np.ndarray:
    """Outputs of the folder read with other choices."""
    other = open_folder(self.case, self.folder, **choices)
    return self.outputs(model=other.model, params=other.params)


def open_folder(case: Case, folder: pathlib.Path, **choices: Any) -> Subject:
  """Read what `case.save` wrote, as anybody would."""
  given = {**case.choices, **choices}
  query = "&".join(f"{name}={value}" for name, value in given.items())
  found, params = pivot_jax.load(
    f"hf:{folder}?{query}", compute=layers.Compute()
  )
  return Subject(case, folder, found.mllm, params)


def forward(
  model: mllm.MLLM, params: Any, batch: tiny_models.Batch
) -> jax.Array:
  """Features of a tower; logits of a language model, zero in the padding."""
  if model.llm is None:
    return model.apply({"params": params}, batch.images[:, 0], method="encode")
  hidden = model.apply({"params": params}, batch)
  logits = hidden @ model.apply({"params": params}, method="head")
  return jnp.where(batch.segments[..., None] > 0, logits, 0)


_forward = jax.jit(forward, static_argnums=0)

# How an architecture's features are read, and its images scaled.
# Patches of 14 pixels at a size that they do not divide.
_BY_14 = dict(image_size=46, patch_size=14)
SIGLIP = dict(read=foreign.penultimate)
CLIP = dict(read=foreign.penultimate_patches, statistics=foreign.CLIP)
DINOV2 = dict(read=foreign.last_patches, statistics=foreign.IMAGENET)
MAE = dict(read=foreign.last_mae_patches, statistics=foreign.IMAGENET)
VIT = dict(read=foreign.last_patches)
MOCO = dict(DINOV2, save=foreign.save_with_statistics)


def made(build, **sizes):
  """Return what makes a model of these sizes."""
  return functools.partial(build, **sizes)


ENCODERS = (
  Case(
    "SigLIP",
    "tanh GELU; 4 heads of 8",
    made(foreign.siglip),
    **SIGLIP,
  ),
  Case(
    "SigLIP 2 So400m",
    "2 heads of 72, MLP 538",
    made(
      foreign.siglip,
      hidden_size=144,
      intermediate_size=538,
      num_attention_heads=2,
    ),
    **SIGLIP,
  ),
  Case(
    "SigLIP 2 giant-opt",
    "2 heads of 96, MLP 768",
    made(
      foreign.siglip,
      hidden_size=192,
      intermediate_size=768,
      num_attention_heads=2,
    ),
    **SIGLIP,
  ),
  Case(
    "CLIP",
    "class token, norm before the blocks, no patch bias, quick GELU,"
    " eps 1e-5; patches of 14",
    made(foreign.clip, **_BY_14),
    image_size=46,
    **CLIP,
  ),
  Case(
    "DINOv2",
    "class token, LayerScale, erf GELU, last norm; patches of 14",
    made(foreign.dinov2, **_BY_14),
    image_size=46,
    **DINOV2,
  ),
  Case(
    "DINOv2 giant",
    "as DINOv2, with the gated MLP",
    made(foreign.dinov2, **_BY_14, use_swiglu_ffn=True),
    image_size=46,
    **DINOV2,
  ),
  Case(
    "DINOv2, resized",
    "`?image_size=72&positions=dinov2`: 7 x 7 positions to 5 x 5",
    made(foreign.dinov2, image_size=98, patch_size=14),
    image_size=72,
    choices=dict(image_size=72, positions="dinov2"),
    **DINOV2,
  ),
  Case(
    "DINOv2, 16 tokens",
    "`?tokens=16`: 5 x 5 patches to 4 x 4, as torch's `interpolate`"
    " (bilinear, corners not aligned)",
    made(foreign.dinov2, image_size=72, patch_size=14),
    image_size=72,
    choices=dict(tokens=16),
    **DINOV2
    | dict(read=functools.partial(foreign.interpolated_patches, side=4)),
  ),
  Case(
    "MAE",
    "class token, fixed sine and cosine positions, erf GELU, eps 1e-12, last"
    " norm; nothing masked",
    made(foreign.mae),
    **MAE,
  ),
  Case(
    "ViT, supervised",
    "class token, learned positions, erf GELU, eps 1e-12, last norm",
    made(foreign.vit),
    **VIT,
  ),
  Case(
    "MoCo v3",
    "a ViT with fixed sine and cosine positions, eps 1e-6; ImageNet's"
    " statistics from the processor's file",
    made(foreign.moco),
    **MOCO,
  ),
)


def llm(name, details, build, **more):
  """A case of text alone."""
  return Case(
    name, details, build, foreign.text_logits, image_size=0, layers=(), **more
  )


def _mllm(name, details, tower, strategy, tied, **more):
  return Case(
    name,
    details,
    lambda: foreign.llava(tower(), strategy, tied),
    foreign.image_logits,
    patches=9,
    **more,
  )


LANGUAGE = (
  llm(
    "Qwen2.5, tied",
    "6 heads, 2 for keys and values",
    made(foreign.qwen2, tied=True),
  ),
  llm(
    "Qwen2.5, untied",
    "the same with a head of its own",
    made(foreign.qwen2, tied=False),
  ),
  _mllm(
    "Llava, SigLIP", "strategy `full`, tied head", foreign.siglip, "full", True
  ),
  _mllm(
    "Llava, CLIP",
    "strategy `default`, which drops the class token; untied head",
    made(foreign.clip, **_BY_14),
    "default",
    False,
    image_size=46,
    statistics=foreign.CLIP,
  ),
)
OFFICIAL = _mllm(
  "LLaVA-NeXT, SigLIP",
  "`llava_qwen`, the layout of the paper's code: other names, the tower without"
  " its last block, its config in another folder; untied head",
  foreign.siglip,
  "full",
  False,
  save=foreign.save_official,
  layers=(-2, -3),
)
