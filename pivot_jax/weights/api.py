"""Models to apply, of published or own weights: `pivot_jax.load` and `save`."""

import dataclasses
import functools
import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree, UInt8

from pivot_jax import addresses, files, trees
from pivot_jax.data import images
from pivot_jax.data.tokenizer import IMAGE_TOKEN, Tokenizer, load_tokenizer
from pivot_jax.errors import InputError
from pivot_jax.models import layers, mllm, qwen2, vit
from pivot_jax.weights import artifacts, checkpoint, export


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A vision encoder, a language model, or an MLLM of the two.

  meta: the content of model.json.
  address: where it was loaded from.
  """

  mllm: mllm.MLLM
  meta: Mapping[str, Any]
  address: str

  @property
  def vision(self) -> vit.VisionConfig | None:
    return self.mllm.vision

  @property
  def llm(self) -> qwen2.LLMConfig | None:
    return self.mllm.llm

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """The tokenizer beside the weights; InputError if there is none."""
    return load_tokenizer(addresses.tokenizer_folder(self.address))

  def apply(
    self,
    variables: Mapping[str, Any],
    *inputs: PyTree,
    method: str | None = None,
  ) -> Float[Array, "..."]:
    """Apply the model; a pure function of `variables` and `inputs`.

    A vision encoder: images uint8 [N, H, W, 3], H = W = image_size, to features
    [N, P, D], those that an MLLM reads (the layer and norm of model.json).
    A language model: tokens int32 [N, T] to float32 logits [N, T, V].
    An MLLM: tokens [N, T] and images [N, H, W, 3] to logits; each row has P
    times -200 where its image is.

    Args:
      variables: `{"params": params}` as `load` returns them.
      method: the name of a method of `models.mllm.MLLM` to apply instead.

    Raises:
      InputError: images that are not uint8, or not one a row; image tokens of a
        row that are not P, which under `jit` cannot be seen and gives numbers
        without meaning.
    """
    if "params" not in variables:
      raise InputError('give {"params": params} with what `load` returned')
    if method is not None:
      return self.mllm.apply(variables, *inputs, method=method)
    if self.llm is None:
      self._check_pixels(*inputs)
      return self.mllm.apply(variables, *inputs, method="encode")
    return self._logits(variables, *inputs)

  def preprocess(self, pictures: Sequence[Any]) -> UInt8[np.ndarray, "N H W 3"]:
    """Return PIL images (or uint8 arrays [h, w, 3]) as the encoder reads them.

    Pixel for pixel what the image processor of the weights does in transformers
    on PIL images, before it scales them, which happens on the device; other
    rules of rounding and of alpha are in docs/formats.md.
    """
    if self.vision is None:
      raise InputError(f"{self.address}: has no vision encoder")
    how = checkpoint.resample(self.meta) or "bicubic"
    return images.preprocess(pictures, self.vision.image_size, resample=how)

  def _logits(
    self,
    variables: Mapping[str, Any],
    ids: Int[Array, "N T"],
    pictures: UInt8[Array, "N H W 3"] | None = None,
  ) -> Float[Array, "N T V"]:
    if np.ndim(ids) != 2 or not jnp.issubdtype(_type(ids), jnp.integer):
      raise InputError(
        f"{self.address}: tokens come first, whole numbers [N, T], and images"
        " after them; for the features of images load ADDRESS:vision"
      )
    ids = jnp.asarray(ids, jnp.int32)
    is_image = ids == IMAGE_TOKEN
    if pictures is not None and self.vision is None:
      raise InputError(f"{self.address}: has no vision encoder for images")
    if pictures is not None and len(pictures) != len(ids):
      raise InputError(
        f"there are {len(pictures)} images for {len(ids)} rows of tokens; each"
        " row has one"
      )
    if pictures is not None:
      self._check_pixels(pictures)
    if not isinstance(ids, jax.core.Tracer):
      self._check_images(np.asarray(is_image), pictures)
    ones = jnp.ones_like(ids)
    places = jnp.cumsum(ones, 1) - 1
    shape = (len(ids), 0, 1, 1, 3)
    batch = types.SimpleNamespace(
      tokens=jnp.where(is_image, 0, ids),
      positions=places,
      # Each row is one causal sequence.
      sequences=places[:, None],
      copies=places[..., None],
      segments=ones,
      branches=0 * ones,
      image_index=jnp.where(is_image, jnp.cumsum(is_image, 1) - 1, -1),
      images=(
        jnp.zeros(shape, jnp.uint8)
        if pictures is None
        else jnp.asarray(pictures)[:, None]
      ),
    )
    model = self.mllm
    visual = model.apply(variables, batch.images, method="see")
    x = model.apply(variables, visual, batch, method="embed")
    hidden = model.apply(variables, x, batch, method="decode")
    head = model.apply(variables, method="head")
    return jnp.einsum(
      "NTE,EV->NTV", hidden, head, preferred_element_type=jnp.float32
    )

  def _check_pixels(self, pictures: Any) -> None:
    side = self.vision.image_size
    shape = np.shape(pictures) if _type(pictures) == jnp.uint8 else ()
    if shape[1:] != (side, side, 3):
      raise InputError(
        f"images must be uint8 [N, {side}, {side}, 3], 0 to 255, as `preprocess`"
        f" returns them; these are {_type(pictures)} {np.shape(pictures)}"
      )

  def _check_images(self, is_image, pictures) -> None:
    counts = set(is_image.sum(1).tolist())
    want = self.vision.num_patches if pictures is not None else 0
    if counts != {want}:
      raise InputError(
        f"rows have {sorted(counts)} image tokens (-200); with"
        f" {'an image' if want else 'no images'} each needs {want}, in place of"
        " the tokenizer's own"
      )


def _type(values: Any) -> Any:
  """Return the dtype of an array, None of anything else."""
  try:
    return jnp.result_type(values)
  except TypeError:
    return None


def load(
  address: str | os.PathLike,
  *,
  dtype: DTypeLike = np.float32,
  mesh: jax.sharding.Mesh | None = None,
  compute: layers.Compute | None = None,
) -> tuple[Pretrained, Any]:
  """Return (model, params) of an address; see `pivot_jax.load`."""
  address = os.fspath(address)
  loaded = checkpoint.load(address, dtype=dtype, mesh=mesh)
  model = loaded.model(compute or layers.Compute(attention="auto"))
  return Pretrained(model, loaded.meta, address), loaded.params


def save(
  folder: str | os.PathLike,
  model: Pretrained,
  params: trees.Params,
  *,
  format: str,
  dtype: str,
  source: str | None,
) -> None:
  """Write a model's parameters; see `pivot_jax.save`."""
  if format not in ("pivot_jax", *export.FORMATS):
    raise InputError(
      f"format {format!r}: choose one of pivot_jax, {', '.join(export.FORMATS)}"
    )
  out = files.local_path(folder, "folder")
  host = _checked(model, jax.device_get(params))
  if format == "pivot_jax":
    _save_artifact(out, model, host)
    return
  host = export.parts_of(host, format)
  meta, rest = dict(model.meta), None
  if "vision" in host:
    rest, meta["unread"] = checkpoint.unread(model.meta, source=source)
  job = export.Job(
    params=host,
    meta=meta,
    unread=rest,
    tokenizer=model.tokenizer if "llm" in host else None,
    dtype=dtype,
    name=model.address,
  )
  export.write(job, out, format=format)


def _checked(model: Pretrained, host: Any) -> Any:
  """Return parameters that are those of the model; parts may be absent."""
  shapes = jax.eval_shape(
    lambda: mllm.init_params(model.mllm, jax.random.key(0))
  )
  parts = ", ".join(shapes)
  if not isinstance(host, Mapping) or not host or host.keys() - shapes.keys():
    found = (
      ", ".join(map(str, host)) if isinstance(host, Mapping) else "no dict"
    )
    raise InputError(
      f"the parameters have the parts {found or 'none'}, the model {parts}: give"
      " what `load` returned, changed or not"
    )
  wrong = trees.diff({part: shapes[part] for part in host}, host)
  if wrong:
    raise InputError(
      f"the parameters are not those of the model: {'; '.join(wrong[:8])}"
    )
  return host


def _save_artifact(out: pathlib.Path, model: Pretrained, host: Any) -> None:
  if out.exists():
    raise InputError(f"{out}: is there already; give a folder that is not")
  tokenizer = model.tokenizer if "llm" in host else None
  with files.writing_folder(out) as folder:
    artifacts.save(folder, host, meta=model.meta)
    if tokenizer is not None:
      tokenizer.save(folder / "tokenizer")
