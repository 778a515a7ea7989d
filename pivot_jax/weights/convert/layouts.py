"""The place of each tensor of a vision tower in other projects' files.

Our names are those of Hugging Face's SigLIP ("encoder.layers.3.mlp.fc1.weight",
`names.py` makes them from paths); a layout says what the same tensor is called
elsewhere, which rows of a fused one it is, and how many leading axes of length
one are put before it. Nothing is read or written here.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

_BLOCK = "encoder.layers."


class Place(NamedTuple):
  """A tensor's name in a layout; `block` of `blocks` equal blocks of its rows.

  lead: leading axes of length one that only the foreign tensor has.
  """

  name: str
  block: int = 0
  blocks: int = 1
  lead: int = 0

  def shape(self, own: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the foreign tensor, from that of ours."""
    rows = (own[0] * self.blocks, *own[1:]) if own else own
    return (1,) * self.lead + rows


class _Layout(NamedTuple):
  """`stem` and `block` map our modules, or whole tensors, to places.

  prefix: of the foreign blocks, with {} for their number.
  """

  prefix: str
  stem: Mapping[str, Place]
  block: Mapping[str, Place]


def _places(names: Mapping[str, str]) -> dict[str, Place]:
  return {ours: Place(theirs) for ours, theirs in names.items()}


def _same(*names: str) -> dict[str, Place]:
  return {name: Place(name) for name in names}


def _fused(name: str, *modules: str) -> dict[str, Place]:
  count = len(modules)
  return {m: Place(name, k, count) for k, m in enumerate(modules)}


_QKV = tuple(f"self_attn.{x}_proj" for x in "qkv")
_SIGLIP = _Layout(
  "encoder.layers.{}.",
  _same(
    "embeddings.class_embedding",
    "embeddings.position_embedding",
    "embeddings.patch_embedding",
    "pre_layrnorm",
    "post_layernorm",
    "head.probe",
    "head.attention.out_proj",
    "head.layernorm",
    "head.mlp.fc1",
    "head.mlp.fc2",
  )
  | {
    f"head.attention.{x}_proj.{leaf}": Place(
      f"head.attention.in_proj_{leaf}", k, 3
    )
    for k, x in enumerate("qkv")
    for leaf in ("weight", "bias")
  },
  _same("layer_norm1", "layer_norm2", *_QKV, "self_attn.out_proj")
  | _same("mlp.fc1", "mlp.fc2"),
)
_VIT_STEM = {
  "embeddings.class_embedding": Place("embeddings.cls_token", lead=2),
  "embeddings.position_embedding.weight": Place(
    "embeddings.position_embeddings", lead=1
  ),
  "embeddings.patch_embedding": Place("embeddings.patch_embeddings.projection"),
  "post_layernorm": Place("layernorm"),
  "mask_token": Place("embeddings.mask_token"),
  "pooler.dense": Place("pooler.dense"),
}
_VIT_ATTENTION = _places(
  {
    "self_attn.q_proj": "attention.attention.query",
    "self_attn.k_proj": "attention.attention.key",
    "self_attn.v_proj": "attention.attention.value",
    "self_attn.out_proj": "attention.output.dense",
  }
)
_DINOV2 = _Layout(
  "encoder.layer.{}.",
  _VIT_STEM,
  _VIT_ATTENTION
  | _same("mlp.fc1", "mlp.fc2", "layer_scale1", "layer_scale2")
  | _places(
    {
      "layer_norm1": "norm1",
      "layer_norm2": "norm2",
      "mlp.down_proj": "mlp.weights_out",
    }
  )
  | _fused("mlp.weights_in", "mlp.gate_proj", "mlp.up_proj"),
)
_VIT = _Layout(
  "encoder.layer.{}.",
  _VIT_STEM,
  _VIT_ATTENTION
  | _places(
    {
      "layer_norm1": "layernorm_before",
      "layer_norm2": "layernorm_after",
      "mlp.fc1": "intermediate.dense",
      "mlp.fc2": "output.dense",
    }
  ),
)
_TIMM = _Layout(
  "blocks.{}.",
  {
    "embeddings.class_embedding": Place("cls_token", lead=2),
    "embeddings.position_embedding.weight": Place("pos_embed", lead=1),
  }
  | _places(
    {
      "embeddings.patch_embedding": "patch_embed.proj",
      "pre_layrnorm": "norm_pre",
      "post_layernorm": "norm",
      "head.probe": "attn_pool.latent",
      "head.attention.q_proj": "attn_pool.q",
      "head.attention.out_proj": "attn_pool.proj",
      "head.layernorm": "attn_pool.norm",
      "head.mlp.fc1": "attn_pool.mlp.fc1",
      "head.mlp.fc2": "attn_pool.mlp.fc2",
    }
  )
  | _fused("attn_pool.kv", "head.attention.k_proj", "head.attention.v_proj"),
  _same("mlp.fc1", "mlp.fc2")
  | _places(
    {
      "layer_norm1": "norm1",
      "layer_norm2": "norm2",
      "self_attn.out_proj": "attn.proj",
      "mlp.down_proj": "mlp.fc2",
      "layer_scale1.lambda1": "ls1.gamma",
      "layer_scale2.lambda1": "ls2.gamma",
    }
  )
  | _fused("attn.qkv", *_QKV)
  | _fused("mlp.fc1", "mlp.gate_proj", "mlp.up_proj"),
)

# By family of encoder for Hugging Face's files, and by tool for the others.
LAYOUTS: Mapping[str, _Layout] = {
  "siglip": _SIGLIP,
  "clip": _SIGLIP,
  "dinov2": _DINOV2,
  "vit": _VIT,
  "vit_mae": _VIT,
  "timm": _TIMM,
}


def place(layout: str, name: str) -> Place | None:
  """Return where a tensor of ours lies, None if the layout has none such."""
  found = LAYOUTS[layout]
  if name.startswith(_BLOCK):
    number, _, inner = name.removeprefix(_BLOCK).partition(".")
    at = _look_up(found.block, inner)
    return at and at._replace(name=found.prefix.format(number) + at.name)
  return _look_up(found.stem, name)


def _look_up(table: Mapping[str, Place], name: str) -> Place | None:
  if name in table:
    return table[name]
  module, _, leaf = name.rpartition(".")
  if module not in table:
    return None
  return table[module]._replace(name=f"{table[module].name}.{leaf}")


def to_foreign(
  layout: str, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Return tensors of ours under a layout's names, fused where it fuses."""
  blocks: dict[str, dict[int, np.ndarray]] = {}
  lead: dict[str, int] = {}
  for name, array in arrays.items():
    at = place(layout, name)
    if at is None:
      raise ValueError(f"{layout} has no tensor for {name}")
    blocks.setdefault(at.name, {})[at.block] = array
    lead[at.name] = at.lead
  found = {}
  for name, parts in blocks.items():
    rows = [parts[k] for k in sorted(parts)]
    array = np.concatenate(rows) if len(rows) > 1 else rows[0]
    found[name] = array.reshape((1,) * lead[name] + array.shape)
  return found
