"""Every family of encoders in a training: all of it trains, all of it leaves."""

import dataclasses

import jax
import numpy as np
import pytest

from pivot_jax import trees
from pivot_jax.models import mllm
from pivot_jax.stages import detach, train
from pivot_jax.weights import checkpoint
from pivot_jax.weights.convert import hf, towers
from tests.fixtures import tiny_models, tiny_stages

# SigLIP trains in every other test, and MAE computes what a ViT does.
FAMILIES = {
  "clip": {},
  "dinov2": {},
  "dinov2_gated": {"gated_mlp": True, "intermediate_size": 16},
  "vit": {},
}
pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
  """Return (folder of the encoder, trained artifact, what the stage says)."""
  name = request.param
  family = name.partition("_gated")[0]
  fields = dict(towers.CHOICES[family])
  vision = dataclasses.replace(
    tiny_stages.VISION, family=family, intermediate_size=32, **fields
  )
  vision = dataclasses.replace(vision, **FAMILIES[name])
  params = mllm.init_params(mllm.MLLM(None, vision), jax.random.key(1))
  params = jax.device_get(tiny_models.jitter(params, scale=2.0))
  root = tmp_path_factory.mktemp(name)
  resample = "crop_bicubic"
  hf.save_vision(root / "hf", vision, params["vision"], resample=resample)
  llm = tiny_stages.save(root / "llm", tiny_stages.params())
  config = tiny_stages.config(
    "train",
    tiny_stages.source("caption", 32),
    batch=8,
    steps=3,
    lr=((".*", 1e-3),),
    warmup=0.0,
  )
  config.resample = resample
  out = root / "out"
  inputs = {"vision": f"hf:{root / 'hf'}", "llm": f"{llm}:llm"}
  said = train.run(config, inputs, out)
  return root, out, said


def test_every_tensor_of_the_encoder_trains(case):
  root, out, said = case
  before = trees.flatten(checkpoint.load(f"hf:{root / 'hf'}").params)
  after = trees.flatten(checkpoint.load(f"{out}:vision").params)
  assert before.keys() == after.keys()
  # A key bias adds the same to every score of a query: it has no gradient.
  still = [
    path
    for path in before
    if np.array_equal(before[path], after[path]) and "k_proj/bias" not in path
  ]
  assert still == []
  assert said["change/vision"] > 1e-4


def test_the_trained_encoder_leaves_in_its_family_s_format(case, tmp_path):
  root, out, _ = case
  detach.run(None, {"init": str(out)}, tmp_path / "cut")
  again = hf.open_folder(tmp_path / "cut" / "hf")
  ours = checkpoint.load(f"{out}:vision")
  assert again.vision == ours.vision
  jax.tree.map(np.testing.assert_array_equal, again.params(), ours.params)
  # What nobody reads is as it came.
  given = hf.open_folder(root / "hf").read_unread()
  jax.tree.map(np.testing.assert_array_equal, again.read_unread(), given)
  assert again.processor == hf.open_folder(root / "hf").processor
