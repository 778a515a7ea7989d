"""`pivot_jax.load` gives models and `pivot_jax.save` writes them."""

import gc
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

import pivot_jax
from pivot_jax import sharding, trees
from pivot_jax.data import images
from pivot_jax.errors import InputError
from pivot_jax.models import layers, mllm, sequences
from pivot_jax.weights import checkpoint, export
from pivot_jax.weights.convert import hf
from tests.fixtures import tiny_models
from tests.weights.convert import folders

MODEL = mllm.MLLM(tiny_models.UNTIED, tiny_models.VISION)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  params = tiny_models.jitter(mllm.init_params(MODEL, jax.random.key(0)))
  folder = tmp_path_factory.mktemp("llava")
  hf.save_llava(
    folder, tiny_models.VISION, tiny_models.UNTIED, params, image_token_id=60
  )
  return folder, jax.tree.map(np.asarray, params)


def _pixels(count=2):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (count, 28, 28, 3)).astype(np.uint8)


def test_an_encoder_gives_the_features_that_an_mllm_reads(whole):
  folder, params = whole
  encoder, loaded = pivot_jax.load(f"hf:{folder}:vision")
  features = jax.jit(encoder.apply)({"params": loaded}, _pixels())
  assert features.shape == (2, 9, 32)
  assert features.dtype == np.float32
  expected = jax.jit(lambda p, x: MODEL.apply(p, x, method="encode"))(
    {"params": params}, _pixels()
  )
  np.testing.assert_allclose(features, expected, rtol=0, atol=1e-6)


def _tokens():
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, 60, (2, 14))
  tokens[:, 2:11] = -200
  return tokens


def test_an_mllm_gives_logits_of_tokens_and_images(whole):
  folder, params = whole
  model, loaded = pivot_jax.load(f"hf:{folder}")
  got = model.apply({"params": loaded}, _tokens(), _pixels())
  assert got.shape == (2, 14, 61)
  batch = tiny_models.prompts((14, 14), width=14)
  image = np.where(_tokens() == -200, np.arange(14) - 2, -1)
  batch = batch._replace(
    tokens=np.maximum(_tokens(), 0),
    image_index=image,
    images=_pixels()[:, None],
  )
  hidden = tiny_models.hidden(MODEL, params, batch)
  expected = hidden @ MODEL.apply({"params": params}, method="head")
  np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_a_language_model_gives_logits_of_tokens(whole):
  folder, _ = whole
  model, loaded = pivot_jax.load(f"hf:{folder}:llm")
  tokens = np.abs(_tokens()) % 60
  got = model.apply({"params": loaded}, tokens)
  # Causal: what follows changes nothing before it.
  other = tokens.copy()
  other[:, 9:] = 0
  again = model.apply({"params": loaded}, other)
  np.testing.assert_allclose(got[:, :9], again[:, :9], rtol=0, atol=1e-6)
  assert np.abs(np.asarray(got[:, 9:] - again[:, 9:])).max() > 1e-3


def test_a_model_attends_in_the_sequences_it_is_given(whole, monkeypatch):
  folder, _ = whole
  plain, loaded = pivot_jax.load(f"hf:{folder}:llm")
  fast, _ = pivot_jax.load(
    f"hf:{folder}:llm", compute=layers.Compute(attention="xla")
  )
  tokens = np.abs(_tokens()) % 60
  expected = plain.apply({"params": loaded}, tokens)
  # A row that is one sequence has as many scores under a mask, which XLA is
  # given then; a kernel would be given the sequences.
  monkeypatch.setattr(mllm, "_visible", lambda batch, _: sequences.Sequences(
    batch.sequences, batch.copies
  ))  # fmt: skip
  got = fast.apply({"params": loaded}, tokens)
  np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("with_image", [True, False])
def test_image_tokens_must_be_as_many_as_features(whole, with_image):
  folder, _ = whole
  model, loaded = pivot_jax.load(f"hf:{folder}")
  tokens = _tokens()
  tokens[:, 2] = 5
  inputs = (tokens, _pixels()) if with_image else (tokens,)
  with pytest.raises(InputError, match=r"rows have \[8\] image tokens"):
    model.apply({"params": loaded}, *inputs)


def test_pictures_are_framed_as_the_weights_say(whole, tmp_path):
  _, params = whole
  hf.save_vision(
    tmp_path, tiny_models.VISION, params["vision"], resample="crop_bilinear:40"
  )
  encoder, _ = pivot_jax.load(f"hf:{tmp_path}")
  rng = np.random.default_rng(0)
  picture = rng.integers(0, 256, (50, 70, 3)).astype(np.uint8)
  got = encoder.preprocess([Image.fromarray(picture), picture])
  assert (got.shape, got.dtype) == ((2, 28, 28, 3), np.uint8)
  expected = images.resize(picture, 28, resample="crop_bilinear:40")
  np.testing.assert_array_equal(got, [expected, expected])


def test_a_language_model_takes_no_pictures(whole):
  model, _ = pivot_jax.load(f"hf:{whole[0]}:llm")
  with pytest.raises(InputError, match="has no vision encoder"):
    model.preprocess([])


def test_an_encoder_is_saved_in_every_format_and_back(whole, tmp_path):
  folder, _ = whole
  encoder, params = pivot_jax.load(f"hf:{folder}:vision")
  params = jax.tree.map(lambda x: x + np.float32(0.25), params)
  for format_, address in (
    ("pivot_jax", "{}"),
    ("hf", "hf:{}"),
    ("big_vision", "bv:{}/siglip_28.npz:img"),
    ("timm", "timm:{}"),
  ):
    out = tmp_path / format_
    pivot_jax.save(out, encoder, params, format=format_)
    again, found = pivot_jax.load(address.format(out))
    folders.equal(found, params)
    assert again.vision == encoder.vision
  with pytest.raises(InputError, match="is there already"):
    pivot_jax.save(tmp_path / "hf", encoder, params, format="hf")
  with pytest.raises(InputError, match="holds no projector"):
    pivot_jax.save(tmp_path / "x", encoder, params, format="llava")
  with pytest.raises(InputError, match="format 'onnx': choose one of"):
    pivot_jax.save(tmp_path / "x", encoder, params, format="onnx")
  assert not (tmp_path / "x").exists()


def test_parameters_come_in_the_dtype_that_is_asked_for(whole):
  _, params = pivot_jax.load(f"hf:{whole[0]}:vision", dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(params)} == {
    np.dtype(ml_dtypes.bfloat16)
  }


def test_parameters_are_placed_leaf_by_leaf(whole, monkeypatch):
  folder, params = whole
  alive: list[weakref.ref] = []
  most = []

  def place_leaf(path, leaf, mesh):
    most.append(sum(ref() is not None for ref in alive))
    alive.append(weakref.ref(leaf))
    return np.array(leaf)

  mesh = sharding.make_mesh({"data": -1})
  placed = checkpoint.load(f"hf:{folder}", mesh=mesh).params
  folders.equal(jax.device_get(placed), params)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(placed))
  monkeypatch.setattr(sharding, "place_leaf", place_leaf)
  gc.disable()  # What only a collection lets go of counts as kept.
  try:
    checkpoint.load(f"hf:{folder}", mesh=mesh)
  finally:
    gc.enable()
  assert len(most) == len(trees.flatten(params))
  # When a leaf is there, those before it are gone.
  assert set(most) == {0}


def test_inputs_that_would_give_numbers_without_meaning_are_refused(whole):
  folder, _ = whole
  model, params = pivot_jax.load(f"hf:{folder}")
  variables = {"params": params}
  with pytest.raises(InputError, match="1 images for 2 rows"):
    model.apply(variables, _tokens(), _pixels(1))
  with pytest.raises(InputError, match="must be uint8 .*; these are float32"):
    model.apply(variables, _tokens(), _pixels() / np.float32(255))
  encoder, params = pivot_jax.load(f"hf:{folder}:vision")
  with pytest.raises(InputError, match="must be uint8 .*; these are float32"):
    jax.jit(encoder.apply)({"params": params}, _pixels() / np.float32(255))
  for inputs in (_pixels()[:, :20], [Image.new("RGB", (28, 28))]):
    with pytest.raises(InputError, match="images must be uint8"):
      encoder.apply({"params": params}, inputs)
  with pytest.raises(InputError, match='give {"params": params}'):
    encoder.apply(params, _pixels())
  with pytest.raises(InputError, match="tokens come first"):
    jax.jit(model.apply)(variables, _pixels())
  llm, params = pivot_jax.load(f"hf:{folder}:llm")
  with pytest.raises(InputError, match="no vision encoder for images"):
    llm.apply({"params": params}, _tokens(), _pixels())


def test_another_dtype_is_refused(whole):
  with pytest.raises(InputError, match="dtype 'int8'"):
    pivot_jax.load(f"hf:{whole[0]}", dtype="int8")


@pytest.mark.parametrize("format_", ["pivot_jax", "hf"])
def test_parameters_of_another_model_are_not_written(whole, tmp_path, format_):
  encoder, params = pivot_jax.load(f"hf:{whole[0]}:vision")
  table = params["vision"]["embeddings"]["position_embedding"]
  table["embedding"] = table["embedding"][:4]
  with pytest.raises(InputError, match=r"is \(4, 32\), not \(9, 32\)"):
    pivot_jax.save(tmp_path / "out", encoder, params, format=format_)
  with pytest.raises(InputError, match="missing vision/"):
    pivot_jax.save(tmp_path / "out", encoder, {"vision": {}}, format=format_)
  with pytest.raises(InputError, match="have the parts a, the model vision"):
    pivot_jax.save(tmp_path / "out", encoder, {"a": 1}, format=format_)
  assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_whole_or_not_there(whole, tmp_path):
  # Without a tokenizer an MLLM cannot be written.
  model, params = pivot_jax.load(f"hf:{whole[0]}")
  with pytest.raises(InputError, match="tokenizer"):
    pivot_jax.save(tmp_path / "out", model, params)
  assert list(tmp_path.iterdir()) == []


def test_an_encoder_leaves_an_mllm_that_has_no_tokenizer(whole, tmp_path):
  export.export(f"hf:{whole[0]}", tmp_path / "out", format="hf")
  model, params = pivot_jax.load(f"hf:{whole[0]}")
  pivot_jax.save(tmp_path / "saved", model, params, format="hf")
  for name in ("out", "saved"):
    _, found = pivot_jax.load(f"hf:{tmp_path / name}")
    folders.equal(found, {"vision": whole[1]["vision"]})
  with pytest.raises(InputError, match="holds no tokenizer"):
    pivot_jax.save(tmp_path / "llava", model, params, format="llava")


def test_a_path_is_an_address(whole, tmp_path):
  encoder, params = pivot_jax.load(f"hf:{whole[0]}:vision")
  pivot_jax.save(tmp_path / "out", encoder, params)
  folders.equal(pivot_jax.load(tmp_path / "out")[1], params)
