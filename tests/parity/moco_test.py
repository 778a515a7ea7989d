"""The documented conversion of MoCo-v3's pickle, run as it is documented."""

import pathlib
import re

import numpy as np
import pytest
import torch
import transformers

import pivot_jax
from pivot_jax.errors import InputError
from pivot_jax.weights.convert import safetensor_files
from tests.parity import foreign

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "formats.md"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  """A folder with a tiny checkpoint of MoCo-v3's form, and torch's model."""
  torch.manual_seed(0)
  # The width of a published encoder, whose heads need no config.
  config = transformers.ViTConfig(
    hidden_size=192,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=28,
    patch_size=14,
    layer_norm_eps=1e-6,
  )
  model = transformers.ViTModel(config, add_pooling_layer=False)
  foreign.roughen(model, 4)
  folder = tmp_path_factory.mktemp("moco")
  model.save_pretrained(folder / "hf")
  state = {}
  stored = safetensor_files.contents(folder / "hf")
  arrays = safetensor_files.read(stored, list(stored))
  for prefix in ("module.base_encoder.", "module.momentum_encoder."):
    scale = 1.0 if "base" in prefix else 2.0
    for name, array in _as_timm(arrays).items():
      state[prefix + name] = scale * torch.tensor(array)
    state[prefix + "head.0.weight"] = torch.ones(3, 3)
  state["module.predictor.0.weight"] = torch.ones(3, 3)
  torch.save(
    {"epoch": 300, "state_dict": state}, folder / "vit-b-300ep.pth.tar"
  )
  return folder, model


def _as_timm(arrays):
  """The tensors of a Hugging Face ViT under timm's names, by hand."""
  found = {}
  for name, x in arrays.items():
    name = name.replace("embeddings.cls_token", "cls_token")
    name = name.replace("embeddings.position_embeddings", "pos_embed")
    name = name.replace(
      "embeddings.patch_embeddings.projection", "patch_embed.proj"
    )
    name = name.replace("encoder.layer.", "blocks.")
    name = name.replace("layernorm_before", "norm1")
    name = name.replace("layernorm_after", "norm2")
    name = name.replace("attention.output.dense", "attn.proj")
    name = name.replace("intermediate.dense", "mlp.fc1")
    name = name.replace("output.dense", "mlp.fc2")
    found[name.replace("layernorm.", "norm.")] = x
  for name in [n for n in found if ".attention.attention.query." in n]:
    parts = [
      found.pop(name.replace("query", part))
      for part in ("query", "key", "value")
    ]
    fused = name.replace("attention.attention.query", "attn.qkv")
    found[fused] = np.concatenate(parts)
  return found


def _snippet():
  (code,) = re.findall(r"```python\n(.+?)```", DOCS.read_text("utf-8"), re.S)
  return code


def test_the_documented_conversion_gives_the_encoder(case, monkeypatch):
  folder, model = case
  monkeypatch.chdir(folder)
  exec(compile(_snippet(), str(DOCS), "exec"), {})
  encoder, params = pivot_jax.load("timm:model.safetensors")
  # The edge of 256 belongs to 224 pixels, which this tiny one does not have.
  assert encoder.meta["preprocessing"]["resample"] == "crop_bilinear"
  assert encoder.vision.image_mean == (0.485, 0.456, 0.406)
  images = foreign.images(2)
  mean, std = (
    torch.tensor(x)
    for x in (encoder.vision.image_mean, encoder.vision.image_std)
  )
  scaled = (torch.tensor(images) / 255 - mean) / std
  with torch.no_grad():
    states = model(scaled.permute(0, 3, 1, 2)).last_hidden_state[:, 1:]
  got = encoder.apply({"params": params}, images)
  assert 0.5 < np.abs(states.numpy()).max() < 30
  assert foreign.difference(got, states) < foreign.TOLERANCE


def test_the_pickle_itself_is_refused(case):
  folder, _ = case
  path = folder / "vit-b-300ep.pth.tar"
  with pytest.raises(InputError, match="can run code"):
    pivot_jax.load(f"timm:{path}")
