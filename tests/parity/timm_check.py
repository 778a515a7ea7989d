"""timm's encoders and ours, both ways; run by hand beside timm 1.0.31.

  pip install --no-deps --target DIR timm==1.0.31
  PYTHONPATH=DIR python -m tests.parity.timm_check OUT

timm imports torchvision, which has no build for every torch: modules of empty
classes stand for it here. Of it timm needs transforms and data sets, which are
not used. What this printed stands in timm_check.txt; the names and shapes of
the tiny models, which it writes to OUT/timm_keys.txt, in tests/golden.
"""

import datetime
import functools
import importlib.abc
import importlib.machinery
import json
import pathlib
import sys
import types
from typing import NamedTuple

import jax
import numpy as np
import safetensors.torch
import torch

import pivot_jax
from pivot_jax.configs import presets
from pivot_jax.models import vit
from pivot_jax.weights.convert import layouts, names, open_weights, towers
from pivot_jax.weights.convert import timm as converter

PIXELS = 28
SIZES = dict(
  img_size=PIXELS,
  patch_size=8,
  embed_dim=32,
  depth=3,
  num_heads=4,
  mlp_ratio=1.5,
  num_classes=0,
)
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CLIP = (
  [0.48145466, 0.4578275, 0.40821073],
  [0.26862954, 0.26130258, 0.27577711],
)
HALF = ([0.5] * 3, [0.5] * 3)


class Case(NamedTuple):
  """A model of timm: its name there, what is said beside, how it is read.

  penultimate: features after the block before the last, without norm.
  head: sizes of a head that other tools leave in such a file.
  """

  architecture: str
  arguments: dict
  statistics: tuple
  penultimate: bool = False
  head: tuple = ()


CASES = {
  # The base has the exact GELU in timm, which no published SigLIP has.
  "siglip_map": Case(
    "vit_base_patch16_siglip_224", {"act_layer": "gelu_tanh"}, HALF, True
  ),
  "siglip_so400m": Case("vit_so400m_patch16_siglip_256", {}, HALF, True),
  "siglip_gap": Case(
    "vit_so400m_patch16_siglip_gap_256", {"act_layer": "gelu_tanh"}, HALF, True
  ),
  "clip_quickgelu": Case("vit_base_patch16_clip_quickgelu_224", {}, CLIP, True),
  "clip": Case("vit_base_patch16_clip_224", {}, CLIP, True),
  "dinov2": Case("vit_base_patch14_dinov2", {}, IMAGENET),
  "dinov2_giant": Case(
    "vit_giant_patch14_dinov2", {"mlp_ratio": 3.0}, IMAGENET
  ),
  "vit": Case("vit_base_patch16_224", {"num_classes": 7}, HALF),
  "mae": Case("vit_base_patch16_224.mae", {}, IMAGENET),
  # MoCo-v3 has timm's names, and the layers of its loss as a head.
  "moco_v3": Case(
    "vit_base_patch16_224.moco_v3", {}, IMAGENET, head=((48, 32), (24, 48))
  ),
}


class _Anything(type):
  """A class of which every attribute is there."""

  def __getattr__(cls, name):
    if name.startswith("__"):
      raise AttributeError(name)
    return name


class _Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds every module of torchvision, and in it every class, empty."""

  def find_spec(self, fullname, path, target=None):
    if fullname.partition(".")[0] == "torchvision":
      return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
    return None

  def create_module(self, spec):
    module = types.ModuleType(spec.name)
    # On a module this is asked for what it lacks.
    module.__getattr__ = functools.partial(_make, spec.name)
    return module

  def exec_module(self, module):
    module.__version__ = "0"


def _make(module, name):
  if name.startswith("__"):
    raise AttributeError(name)
  return _Anything(name, (), {"__module__": module})


def build(case, **choices):
  """The tiny model, with noise on every tensor."""
  name = case.architecture.partition(".")[0]
  model = timm.create_model(name, **SIZES | case.arguments | choices)
  return _jitter(model).eval()


def _jitter(model):
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, x in model.named_parameters():
      noise = torch.randn(x.shape, generator=generator)
      if name in ("pos_embed", "cls_token", "attn_pool.latent"):
        # Small, so that the norms' epsilon shows.
        x.copy_(0.03 * noise)
      elif name.startswith("patch_embed"):
        x.copy_((0.03 if x.ndim > 1 else 0.01) * noise)
      elif name.endswith("gamma"):
        x.copy_(noise.sigmoid())
      elif x.ndim == 1:
        x.add_(0.1 * noise)
      else:
        x.copy_(noise * x.shape[1] ** -0.5)
  return model


def features(model, case, images):
  """The features that timm gives of such an encoder."""
  mean, std = (torch.tensor(x) for x in case.statistics)
  x = (torch.tensor(images).float() / 255 - mean) / std
  x = x.permute(0, 3, 1, 2)
  with torch.no_grad():
    if not case.penultimate:
      return model.forward_features(x)[:, model.num_prefix_tokens :].numpy()
    (found,) = model.forward_intermediates(
      x,
      indices=[len(model.blocks) - 2],
      norm=False,
      output_fmt="NLC",
      intermediates_only=True,
    )
  return found.numpy()


def write(folder, model, case):
  """A folder as timm's hub has it."""
  folder.mkdir(parents=True)
  arrays = dict(model.state_dict())
  for index, shape in enumerate(case.head):
    arrays[f"head.{index}.weight"] = torch.zeros(shape)
  safetensors.torch.save_file(arrays, folder / "model.safetensors")
  mean, std = case.statistics
  architecture, _, tag = case.architecture.partition(".")
  config = {
    "architecture": architecture,
    "pretrained_cfg": {
      "tag": tag,
      "mean": mean,
      "std": std,
      "input_size": [3, PIXELS, PIXELS],
    },
    "model_args": SIZES | case.arguments,
  }
  (folder / "config.json").write_text(json.dumps(config))


def check(name, case, folder):
  """Read timm's folder and give it back; return the facts and the verdict."""
  theirs = build(case)
  images = np.random.default_rng(0).integers(0, 256, (2, PIXELS, PIXELS, 3))
  images = images.astype(np.uint8)
  expected = features(theirs, case, images)
  write(folder / name, theirs, case)
  model, params = pivot_jax.load(f"timm:{folder / name}")
  got = np.asarray(model.apply({"params": params}, images))
  into = float(np.abs(got - expected).max())
  out = folder / f"{name}_back"
  pivot_jax.save(out, model, params, format="timm")
  config = json.loads((out / "config.json").read_text())
  # Strict: a tensor too many or too few raises.
  again = timm.create_model(
    config["architecture"],
    checkpoint_path=str(out / "model.safetensors"),
    **config["model_args"],
  ).eval()
  back = float(np.abs(features(again, case, images) - got).max())
  local = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
  same = np.array_equal(
    features(local, case, images), features(again, case, images)
  )
  kept = {k: v for k, v in theirs.state_dict().items() if k[:5] != "head."}
  found = again.state_dict()
  equal = kept.keys() == found.keys() and all(
    torch.equal(found[k], v) for k, v in kept.items()
  )
  row = (
    *(name, config["architecture"], f"{np.abs(expected).max():.1f}"),
    *(f"{into:.1e}", f"{back:.1e}", _word(equal), _word(same)),
  )
  return row, max(into, back) < 1e-5 and equal and same


def full_size(name):
  """Compare names and shapes of timm's model of a preset with ours."""
  config = vit.VisionConfig(**presets.VISION[name])
  pooled = config.family == "siglip"
  architecture = converter.architecture(config, pooled=pooled)
  arguments = (
    {} if config.family != "dinov2" else {"img_size": config.image_size}
  )
  with torch.device("meta"):
    model = timm.create_model(architecture, num_classes=0, **arguments)
  theirs = {k: tuple(v.shape) for k, v in model.state_dict().items()}
  ours = {
    n: s.shape
    for n, s in names.slots(open_weights.shapes_of(config, None)).items()
  }
  ours = {n.removeprefix("vision."): s for n, s in ours.items()}
  ours |= towers.unread(config) | (towers.extras(config) if pooled else {})
  places = {n: layouts.place("timm", n) for n in ours}
  wanted = {places[n].name: places[n].shape(s) for n, s in ours.items()}
  return architecture, theirs == wanted


def main(folder):
  """Print the tables; return 1 if something differs."""
  said, sound = [], True
  say = said.append
  versions = ", ".join(
    f"{m.__name__} {m.__version__}" for m in (timm, torch, jax)
  )
  say(f"{versions}, {datetime.date.today().isoformat()}\n")
  header = (
    *("case", "written as", "largest", "timm to us", "us to timm"),
    *("tensors equal", "local-dir equal"),
  )
  rows = [header]
  for name, case in CASES.items():
    row, good = check(name, case, folder)
    rows.append(row)
    sound &= good
  say(_table(rows))
  rows = [("preset", "timm's model", "names and shapes equal")]
  for name in presets.VISION:
    architecture, equal = full_size(name)
    rows.append((name, architecture, _word(equal)))
    sound &= equal
  say("\n" + _table(rows))
  keys = [
    f"{name} {key} {'x'.join(map(str, x.shape))}"
    for name, case in CASES.items()
    for key, x in sorted(build(case, num_classes=0).state_dict().items())
  ]
  (folder / "timm_keys.txt").write_text("\n".join(keys) + "\n")
  sys.stdout.write("\n".join(said) + "\n")
  return 0 if sound else 1


def _table(rows):
  widths = [max(map(len, column)) for column in zip(*rows)]
  return "\n".join(
    "  ".join(x.ljust(w) for x, w in zip(row, widths)).rstrip() for row in rows
  )


def _word(holds):
  return "yes" if holds else "NO"


if __name__ == "__main__":
  sys.meta_path.insert(0, _Torchvision())
  import timm

  sys.exit(main(pathlib.Path(sys.argv[1])))
