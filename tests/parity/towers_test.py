"""Towers and models against transformers, and the same with a detail wrong.

A mutant is our model with the right weights and one detail wrong: a comparison
that does not see it proves nothing about that detail. `report.py` measures the
same, and larger ones, for docs/parity.md.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pivot_jax.models import layers
from pivot_jax.weights.convert import positions
from tests.parity import cases, foreign

MISS = 10  # tolerances: what a wrong detail must be off by at least
_BLOCKS = "vision/encoder/layers"
_DECODER = "llm/layers"
Mutants = dict[str, Callable[[], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Truth:
  """The output of torch for a case, in float64 too, and a gradient.

  The gradient is that of sum(output * direction) by the image's 0..255; None
  without images.
  """

  output: np.ndarray
  exact: np.ndarray
  direction: np.ndarray
  gradient: np.ndarray | None


def write(case: cases.Case, folder: Path) -> Truth:
  """Make torch's model of a case, write its folder and run it."""
  model = foreign.roughen(
    case.build(), 1, embeddings=case.embeddings, matrices=case.matrices
  )
  case.save(model, folder)
  model.requires_grad_(False)
  batch = case.batch()
  images = torch.zeros(1, 1, 1, 3)
  if case.image_size:
    images = torch.tensor(batch.images[:, 0]).float()
  pixels = foreign.pixels(images.requires_grad_(), case.statistics)
  output = case.read(model, pixels, batch)
  rng = torch.Generator().manual_seed(2)
  direction = torch.randn(output.shape, generator=rng)
  if case.image_size:
    (output * direction).sum().backward()
  with torch.no_grad():
    pixels = foreign.pixels(images.double(), case.statistics)
    exact = case.read(model.double(), pixels, batch)
  return Truth(
    output.detach().numpy(),
    exact.numpy(),
    direction.numpy(),
    images.grad.numpy() if case.image_size else None,
  )


def gradient(subject: cases.Subject, direction: np.ndarray) -> np.ndarray:
  """Our gradient of sum(output * direction) by the image's 0..255."""

  def product(images, params, batch):
    batch = batch._replace(images=images[:, None])
    return (cases.forward(subject.model, params, batch) * direction).sum()

  images = jnp.asarray(subject.batch.images[:, 0], jnp.float32)
  run = jax.jit(jax.grad(product))
  return np.asarray(run(images, subject.params, subject.batch))


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
  """The largest difference of two gradients by the largest entry."""
  return foreign.difference(ours, theirs) / float(np.abs(theirs).max())


def misses(truth: Truth, subject: cases.Subject) -> dict[str, float]:
  """Distances of the output from torch's, each time with one detail wrong."""
  found: Mutants = {}
  if subject.model.vision is not None:
    found |= _choices(subject) | _leaves(subject) | _resizes(subject)
  if subject.model.llm is not None:
    found |= _decoders(subject)
  if subject.case.patches:
    found |= _joints(subject)
  return {
    name: foreign.difference(output(), truth.output)
    for name, output in found.items()
  }


def _choices(subject) -> Mutants:
  """A tower with another number, activation or layer."""
  config = subject.model.vision

  def other(**change):
    vision = dataclasses.replace(config, **change)
    return lambda: subject.outputs(model=subject.model.clone(vision=vision))

  def reopened(**change):
    return lambda: subject.reopened(**change)

  red, *rest = config.image_mean
  found = {"image mean of red + 0.02": other(image_mean=(red + 0.02, *rest))}
  for eps in (1e-5, 1e-6, 1e-12):
    if eps != config.layer_norm_eps:
      found[f"LayerNorm eps {eps:g}"] = other(layer_norm_eps=eps)
  kinds = {"gelu": "erf", "gelu_pytorch_tanh": "tanh", "quick_gelu": "quick"}
  for kind in kinds if not config.gated_mlp else ():
    if kind != config.hidden_act:
      found[f"{kinds[kind]} GELU"] = other(hidden_act=kind)
  for layer in subject.case.layers:
    if layer != config.feature_layer:
      found[f"hidden state {layer}"] = reopened(feature_layer=layer)
  name = "no last norm" if config.final_norm else "a last norm"
  found[name] = reopened(final_norm=not config.final_norm)
  if config.pre_norm:
    found["no norm before the blocks"] = other(pre_norm=False)
  return found


def _leaves(subject) -> Mutants:
  """A tower with other parameters."""
  config, leaves = subject.model.vision, subject.leaves

  def without(path):
    return lambda: subject.edited({path: np.zeros_like(leaves[path])})

  stem = "vision/embeddings"
  table = f"{stem}/position_embedding/embedding"
  rolled = {table: np.roll(leaves[table], 1, 0)}
  found = {"positions one off": lambda: subject.edited(rolled)}
  # A key bias adds the same to every score of a query: softmax does not see it.
  modules = [f"self_attn/{name}_proj" for name in ("q", "v", "out")]
  if config.gated_mlp:
    modules += [f"mlp/{name}_proj" for name in ("gate", "up", "down")]
  else:
    modules += ["mlp/fc1", "mlp/fc2"]
  for module in modules:
    name = module.rpartition("/")[2]
    found[f"no {name} bias"] = without(f"{_BLOCKS}/{module}/bias")
  if config.patch_bias:
    found["no patch bias"] = without(f"{stem}/patch_embedding/bias")
  if config.gated_mlp:
    swap = _exchanged(leaves, f"{_BLOCKS}/mlp", ("kernel", "bias"))
    found["gate and up exchanged"] = lambda: subject.edited(swap)
  if config.layer_scale:
    scales = [f"{_BLOCKS}/layer_scale{k}/lambda1" for k in (1, 2)]
    ones = {path: np.ones_like(leaves[path]) for path in scales}
    found["no LayerScale"] = lambda: subject.edited(ones)
  if config.class_token:
    vision = dataclasses.replace(config, class_token=False)
    found["no class token"] = lambda: subject.edited(
      {table: leaves[table][1:]}, model=subject.model.clone(vision=vision)
    )
  return found


def _exchanged(leaves, module, names):
  gate, up = f"{module}/gate_proj", f"{module}/up_proj"
  pairs = [(f"{gate}/{x}", f"{up}/{x}") for x in names]
  return {a: leaves[b] for pair in pairs for a, b in (pair, pair[::-1])}


def _resizes(subject) -> Mutants:
  """Positions or features resized by another rule."""
  found: Mutants = {}
  if "positions" in subject.case.choices:
    found["positions by big_vision's rule"] = lambda: subject.reopened(
      positions="big_vision"
    )
  config = subject.model.vision
  if not config.feature_tokens:
    return found
  side = round(config.feature_tokens**0.5)
  vision = dataclasses.replace(config, feature_tokens=0)
  whole = subject.model.clone(vision=vision)

  def by(method):
    resize = functools.partial(positions.resize, method=method)
    grids = subject.outputs(model=whole)
    return np.stack([resize(x, side, class_token=False) for x in grids])

  def smoothed():
    x = subject.outputs(model=whole)
    x = x.reshape(len(x), config.grid, config.grid, -1)
    shape = (len(x), side, side, x.shape[-1])
    y = jax.image.resize(x, shape, "bilinear", antialias=True)
    return np.asarray(y).reshape(len(x), side**2, -1)

  return found | {
    "tokens with corners aligned": lambda: by("big_vision"),
    "tokens bicubic": lambda: by("dinov2"),
    "tokens with antialiasing": smoothed,
  }


def _decoders(subject) -> Mutants:
  """A language model with a detail wrong."""
  config, leaves = subject.model.llm, subject.leaves

  def other(edits=None, **change):
    llm = dataclasses.replace(config, **change)
    model = subject.model.clone(llm=llm)
    return lambda: subject.edited(edits or {}, model=model)

  found = {
    "rope theta 1e4": other(rope_theta=1e4),
    "RMSNorm eps 1e-5": other(rms_norm_eps=1e-5),
    "gate and up exchanged, LLM": other(
      _exchanged(leaves, f"{_DECODER}/mlp", ("kernel",))
    ),
    "key heads tiled": other(_tiled(config, leaves)),
  }
  for name in ("q_proj", "k_proj", "v_proj"):
    path = f"{_DECODER}/self_attn/{name}/bias"
    found[f"no {name} bias, LLM"] = other({path: np.zeros_like(leaves[path])})
  if config.tie_word_embeddings:
    table = leaves["llm/embed_tokens/embedding"]
    # Another matrix of the same kind.
    head = {"llm/lm_head/kernel": np.roll(table, 1, 0).T}
    return found | {"another head": other(head, tie_word_embeddings=False)}
  return found | {"head tied": other(tie_word_embeddings=True)}


def _tiled(config, leaves):
  """Query heads so placed that head a reads key head a % K, not a // (A / K)."""
  heads, kv = config.num_attention_heads, config.num_key_value_heads
  order = np.arange(heads).reshape(-1, kv).T.reshape(-1)
  axes = {"q_proj/kernel": 2, "q_proj/bias": 1, "o_proj/kernel": 1}
  found = {}
  for name, axis in axes.items():
    path = f"{_DECODER}/self_attn/{name}"
    x = leaves[path]
    split = (*x.shape[:axis], heads, config.head_dim, *x.shape[axis + 1 :])
    found[path] = x.reshape(split).take(order, axis).reshape(x.shape)
  return found


def _joints(subject) -> Mutants:
  """The layers between tower and language model."""
  leaves, batch = subject.leaves, subject.batch

  def tanh():
    with mock.patch.object(layers, "gelu_erf", layers.gelu_tanh):
      return np.asarray(cases.forward(subject.model, subject.params, batch))

  found = {"projector with tanh GELU": tanh}
  for name in ("linear_1", "linear_2"):
    path = f"projector/{name}/bias"
    zero = {path: np.zeros_like(leaves[path])}
    found[f"no projector {name} bias"] = lambda zero=zero: subject.edited(zero)
  swapped = batch._replace(images=batch.images[::-1])
  found["images exchanged"] = lambda: subject.outputs(batch=swapped)
  return found


@pytest.fixture(
  scope="module", params=[*cases.ENCODERS, cases.OFFICIAL], ids=lambda x: x.name
)
def compared(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("tower")
  truth = write(request.param, folder)
  return truth, cases.open_folder(request.param, folder)


def test_outputs_agree(compared):
  truth, subject = compared
  assert 0.5 < np.abs(truth.output).max() < 20
  got = subject.outputs()
  assert foreign.difference(got, truth.output) < subject.case.tolerance


def test_the_gradients_of_the_image_agree(compared):
  truth, subject = compared
  got = gradient(subject, truth.direction)
  assert relative(got, truth.gradient) < cases.GRADIENT_TOLERANCE


@pytest.mark.nightly
def test_every_wrong_detail_misses_by_ten_tolerances(compared):
  truth, subject = compared
  least = MISS * subject.case.tolerance
  # Compiling so many programs, each to run once, takes longer than running.
  with jax.disable_jit():
    found = misses(truth, subject)
  assert not {name: miss for name, miss in found.items() if not miss >= least}
