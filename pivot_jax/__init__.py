"""RL makes MLLMs see better than SFT, in JAX: `load` and `save` of weights.

  import pivot_jax
  encoder, params = pivot_jax.load("package:toy:vision")
  features = encoder.apply({"params": params}, encoder.preprocess(pil_images))
  pivot_jax.save("out", encoder, params, format="hf")

jax is imported when one of them is called: importing the package is quick, and
the command answers a wrong flag before that.
"""

import importlib.util
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  import jax

  from pivot_jax.models import layers
  from pivot_jax.weights import api

__version__ = "0.1.0"


def _find_recipes() -> None:
  """Make `pivot_jax.configs` importable where it lies beside the package.

  So it does in a clone; a wheel has it inside.
  """
  name, inside = (
    f"{__name__}.configs",
    pathlib.Path(__file__).parent / "configs",
  )
  beside = pathlib.Path(__file__).parents[1] / "configs" / "__init__.py"
  if inside.is_dir() or not beside.with_name("common.py").is_file():
    return
  spec = importlib.util.spec_from_file_location(
    name, beside, submodule_search_locations=[str(beside.parent)]
  )
  assert spec and spec.loader
  sys.modules[name] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(sys.modules[name])
  sys.modules[__name__].configs = sys.modules[name]


_find_recipes()


def load(
  address: str | os.PathLike,
  *,
  dtype: str | type | np.dtype = "float32",
  mesh: "jax.sharding.Mesh | None" = None,
  compute: "layers.Compute | None" = None,
) -> "tuple[api.Pretrained, Any]":
  """Return (model, params) of any address.

  Addresses: `hf:DIR` or `hf:org/name` (Hugging Face: SigLIP, CLIP, DINOv2, MAE,
  ViT, Qwen2.5, Llava, LLaVA-NeXT), `bv:FILE.npz[:img]` (big_vision),
  `timm:FILE.safetensors`, `DIR[:subtree]` (ours), `package:NAME[:subtree]`.
  Published weights take choices, as `hf:DIR?image_size=378&positions=dinov2`.

  Args:
    address: what to load.
    dtype: of the parameters, "float32" or "bfloat16".
    mesh: a mesh of `pivot_jax.sharding.make_mesh` to place each leaf on as it
      is read, so that host memory holds few leaves at a time; None: numpy.
    compute: `pivot_jax.models.layers.Compute`, how to compute (dtype,
      remat, attention).

  Returns:
    An `api.Pretrained` with `apply`, `preprocess`, `meta`, and the nested
    dict of parameters: `vision`, `projector` and `llm`, as far as there are.
    A vision encoder maps uint8 [N, H, W, 3] to features [N, P, D].

  Raises:
    pivot_jax.errors.InputError: nothing there, pickled or damaged weights, or
      tensors that do not fit; all of them are listed.
  """
  from pivot_jax.weights import api

  return api.load(address, dtype=dtype, mesh=mesh, compute=compute)


def save(
  folder: str | os.PathLike,
  model: "api.Pretrained",
  params: Mapping[str, Any],
  *,
  format: str = "pivot_jax",
  dtype: str = "float32",
  source: str | None = None,
) -> None:
  """Write a model with these parameters, given or trained.

  Args:
    folder: must not be there; it is whole or not written.
    model: as `load` returned it.
    params: its parameters; without `llm` and `projector` it is the encoder.
    format: "pivot_jax" (an artifact that `load` reads), "hf", "llava", "timm"
      or "big_vision" (`python -m pivot_jax.export --help` describes each).
    dtype: "float32", "bfloat16" or "float16", for the foreign formats.
    source: the address of the original weights, if they have moved: what was
      not trained is taken from there.

  Raises:
    pivot_jax.errors.InputError: the format does not go with the model, or the
      original weights of what is not trained cannot be found.
  """
  from pivot_jax.weights import api

  api.save(folder, model, params, format=format, dtype=dtype, source=source)
