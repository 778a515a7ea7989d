"""Gradient maps against plain implementations, and a whole run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from pivot_jax import addresses, errors
from pivot_jax.data import packing
from pivot_jax.data.scenes import scenes
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.evals import gradients
from pivot_jax.models import mllm, qwen2, vit
from pivot_jax.stages import gradcam
from pivot_jax.training import objectives
from pivot_jax.weights import checkpoint

TOKENIZER = load_tokenizer(addresses.tokenizer_folder("package:toy"))
VISION = vit.VisionConfig(
  image_size=48,
  patch_size=8,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=2,
)
LLM = qwen2.LLMConfig(
  vocab_size=TOKENIZER.vocab_size,
  hidden_size=24,
  intermediate_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  rope_theta=1e4,
  rms_norm_eps=1e-6,
  tie_word_embeddings=True,
)
MODULE = mllm.MLLM(llm=LLM, vision=VISION)
BETA = 0.1


def config(**fields):
  source = dict(kind="scenes", task="preference", split="gradcam", size=11)
  return ConfigDict(
    dict(
      name="gradcam",
      data="a",
      sources=dict(a=source),
      compute=dict(dtype="float32", remat="none", scan=False),
      mesh=dict(data=-1, fsdp=1, tensor=1),
      template="qwen_1_5",
      mask="paper",
      resample="bicubic",
      max_length=2048,
      batch=8,
      beta=BETA,
      chunk=4096,
      examples=3,
      seed=0,
    )
    | fields
  )


@pytest.fixture(scope="module")
def model():
  params = mllm.init_params(MODULE, jax.random.key(0))
  # Fresh matrices are so small that the image hardly reaches the answer.
  params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)
  return checkpoint.Model(MODULE, params, TOKENIZER, {})


@pytest.fixture(scope="module")
def three(model):
  source = scenes.Scenes(task="preference", split="gradcam", size=3)
  found, _ = gradcam.read_scenes(config(), model, source)
  return found


def packed(found, *, copies=(0, 1, 2)):
  examples = [scene.examples[i] for i in copies for scene in found]
  layout = packing.layout_for(
    [examples], patches=36, image_size=48, row_tokens=256
  )
  layout = packing.Layout(
    rows=len(examples),
    examples=0,
    tokens=256,
    images=1,
    image_size=48,
    patches=36,
    sequences=1,
    sequence=256,
    copies=1,
    losses=layout.losses,
    pairs=0,
  )
  return packing.pack_in_order(examples, layout)


@jax.jit
def row_gradients(params, batch):
  return gradients.row_gradients(MODULE, params, batch, chunk=4096)


@jax.jit
def row_sums(params, projected, batch):
  values = objectives.logps_from_visual(MODULE, params, projected, batch)
  return jnp.where(batch.loss_answer >= 0, values, 0).sum(axis=1)


@pytest.fixture(scope="module")
def taken(model, three):
  return row_gradients(model.params, packed(three))


def test_the_map_of_dpo_total_is_the_gradient_of_one_shared_image(
  model, three, taken
):
  """T13: an image encoded once for both answers gets the sum of branches."""
  pairs = [
    packing.Example(
      id="x",
      images=scene.examples[0].images,
      prompt=scene.examples[1].prompt,
      prompt_targets=scene.examples[1].prompt_targets,
      answers=(scene.examples[1].answers[0], scene.examples[2].answers[0]),
      answer_targets=tuple(scene.examples[i].answer_targets[0] for i in (1, 2)),
      reference=(-3.0, -9.0),
    )
    for scene in three
  ]
  layout = packing.layout_for(
    [[pair] for pair in pairs], patches=36, image_size=48
  )

  def loss(projected, batch):
    logps = objectives.logps_from_visual(MODULE, model.params, projected, batch)
    value, found = objectives.dpo_from_logps(logps, batch, beta=BETA)
    return value, found["rewards/margins"][0]

  def whole(features, batch):
    visual = objectives.project(MODULE, model.params, features, batch)
    return loss(visual, batch)

  @jax.jit
  def maps_of(batch):
    features = objectives.features(MODULE, model.params, batch)
    projected = objectives.project(MODULE, model.params, features, batch)
    at_encoder, margin = jax.grad(whole, has_aux=True)(features, batch)
    at_projector, _ = jax.grad(loss, has_aux=True)(projected, batch)
    return [jnp.abs(x[0]).sum(-1) for x in (at_encoder, at_projector)], margin

  maps, margin = zip(*(maps_of(packing.pack([p], layout)) for p in pairs))
  want = dict(zip(("encoder", "projector"), map(np.stack, zip(*maps))))
  found = gradients.loss_maps(taken, jnp.asarray(margin), beta=BETA)
  assert np.abs(margin).max() > 0.1
  for tap, maps in want.items():
    size = np.max(maps)
    np.testing.assert_allclose(
      found[f"{tap}/dpo_total"], maps, atol=1e-4 * size
    )


def test_the_map_of_the_chosen_branch_holds_the_rejected_one_fixed(
  model, three, taken
):
  batch = packed(three[:1], copies=(1, 2))
  features = objectives.features(MODULE, model.params, batch)

  def loss(chosen):
    both = jnp.stack([chosen, features[1]])
    visual = objectives.project(MODULE, model.params, both, batch)
    sums = row_sums(model.params, visual, batch)
    # The model is its own reference, whose value does not move.
    margin = sums - jax.lax.stop_gradient(sums)
    return -jax.nn.log_sigmoid(BETA * (margin[0] - margin[1]))

  want = np.abs(jax.grad(loss)(features[0])).sum(-1)
  found = gradients.loss_maps(taken, jnp.zeros(3), beta=BETA)
  np.testing.assert_allclose(
    found["encoder/dpo_chosen"][0], want, atol=1e-4 * want.max()
  )


def test_the_map_of_sft_is_the_gradient_of_the_token_mean(model, three, taken):
  example = three[0].examples[0]
  layout = packing.layout_for([[example]], patches=36, image_size=48)
  batch = packing.pack([example], layout)

  def loss(features):
    visual = objectives.project(MODULE, model.params, features, batch)
    logps = objectives.logps_from_visual(MODULE, model.params, visual, batch)
    return objectives.sft_from_logps(logps, batch)[0]

  features = objectives.features(MODULE, model.params, batch)
  want = np.abs(jax.grad(loss)(features)[0]).sum(-1)
  found = gradients.loss_maps(taken, jnp.zeros(3), beta=BETA)
  np.testing.assert_allclose(
    found["encoder/sft"][0], want, atol=1e-4 * want.max()
  )


def test_the_gradient_at_the_projector_is_a_finite_difference(
  model, three, taken
):
  batch = packed(three)
  features = objectives.features(MODULE, model.params, batch)
  visual = objectives.project(MODULE, model.params, features, batch)
  # Uphill, where the slope is the sum of the map and stands out of rounding.
  way, step = jnp.sign(taken.projector), 1e-2
  up, down = (
    row_sums(model.params, visual + sign * step * way, batch)
    for sign in (1, -1)
  )
  slope = (up - down) / (2 * step)
  want = gradients.magnitude(taken.projector).sum(axis=1)
  np.testing.assert_allclose(slope, want, rtol=0.02)


def test_a_row_that_reads_one_patch_has_all_its_gradient_there(model, three):
  batch = packed(three)
  one = np.where(batch.image_index == 7, 7, -1)
  taken = row_gradients(model.params, batch._replace(image_index=one))
  share = np.zeros((3, 36))
  share[:, 7] = 1.0
  for name, values in gradients.loss_maps(
    taken, jnp.zeros(3), beta=BETA
  ).items():
    ratio = gradients.localisation(np.asarray(values), share)
    np.testing.assert_allclose(ratio, 36.0, rtol=1e-6, err_msg=name)


def test_the_scale_of_a_map_cancels(taken):
  share = np.random.default_rng(0).random((3, 36))
  ratios = [
    gradients.localisation(
      np.asarray(
        gradients.loss_maps(taken, jnp.full(3, margin), beta=beta)[
          "encoder/dpo_total"
        ]
      ),
      share,
    )
    for margin, beta in ((0.0, 0.1), (2.0, 0.7))
  ]
  np.testing.assert_allclose(*ratios, rtol=1e-5)


def test_the_supervised_targets_are_the_answer_alone(three):
  supervised, chosen, rejected = three[0].examples
  assert not supervised.prompt_targets.any()
  assert supervised.answer_targets[0].sum() < chosen.answer_targets[0].sum()
  said = TOKENIZER.decode(supervised.answers[0][supervised.answer_targets[0]])
  assert said == three[0].row["chosen"] + "<|im_end|>"
  assert three[0].row["rejected"] in TOKENIZER.decode(rejected.answers[0])


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint, "load_model", lambda *_, **__: model)
    folders = [tmp_path_factory.mktemp("gradcam") for _ in range(2)]
    found = [
      gradcam.run(config(batch=size), {"init": "x"}, out)
      for size, out in zip((8, 16), folders)
    ]
  return found, folders[0]


def test_a_run_reports_each_tap_and_loss_over_all_scenes(finished):
  (found, _), out = finished
  names = {
    f"{tap}/{loss}"
    for tap in ("encoder", "projector")
    for loss in ("sft", "dpo_chosen", "dpo_total")
  }
  assert set(found) == names | {"scenes", "without_object"}
  assert found["scenes"] + found["without_object"] == 11
  with np.load(out / "values.npz") as values:
    assert set(values) == names | {"id", "kind", "mask_share"}
    for name in names:
      assert found[name]["value"] == pytest.approx(values[name].mean())
      assert found[name]["n"] == found["scenes"]
      assert found[name]["se"] > 0


def test_a_run_keeps_examples_to_look_at(finished):
  _, out = finished
  texts = json.loads((out / "examples.json").read_text())
  assert len(texts) == 3 and texts[0]["question"]
  with np.load(out / "maps.npz") as maps:
    assert maps["images"].shape == (3, 48, 48, 3)
    assert maps["masks"].shape == (3, 48, 48)
    assert maps["encoder/sft"].shape == (3, 6, 6)
    assert maps["picture/encoder/sft"].max() == 1.0


def test_the_numbers_do_not_depend_on_the_batch(finished):
  (one, two), _ = finished
  for name, value in one.items():
    if "/" in name:
      assert value["value"] == pytest.approx(two[name]["value"], rel=1e-4)


def test_a_row_without_a_mask_is_named(model):
  class Source(list):
    def name(self, index):
      return f"file:{index + 1}"

  row = dict(scenes.Scenes(task="preference", size=1)[0])
  del row["object_mask"]
  with pytest.raises(errors.InputError, match="file:1: 'object_mask'"):
    gradcam.read_scenes(config(), model, Source([row]))


def test_resized_features_lie_over_cells_of_the_image(model):
  rows = scenes.Scenes(task="preference", split="gradcam", size=3)

  def shares(tokens):
    vision = dataclasses.replace(VISION, feature_tokens=tokens)
    module = model.mllm.clone(vision=vision)
    other = dataclasses.replace(model, mllm=module)
    return gradcam.read_scenes(config(), other, rows)[0]

  for scene in shares(16):
    assert scene.share.shape == (16,)
    # 48 pixels in cells of 12.
    cells = scene.mask.reshape(4, 12, 4, 12).mean(axis=(1, 3))
    np.testing.assert_allclose(scene.share, cells.reshape(-1), atol=1e-6)
  with pytest.raises(errors.InputError, match="25 features do not divide"):
    shares(25)
