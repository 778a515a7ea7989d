"""preprocessor_config.json: what is read, refused and written."""

import json

import numpy as np
import pytest
import transformers
from PIL import Image

from pivot_jax import errors
from pivot_jax.data import images
from pivot_jax.weights.convert import processor

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
KINDS = ("siglip", "clip", "dinov2", "vit", "vit_mae")


def _write(folder, file="preprocessor_config.json", **fields):
  (folder / file).write_text(json.dumps(fields))


def _read(folder, **fields):
  _write(folder, **fields)
  return processor.read(folder)


def test_a_folder_without_processor_has_none(tmp_path):
  assert processor.read(tmp_path) is None
  _write(tmp_path, "processor_config.json", image_seq_length=576)
  assert processor.read(tmp_path) is None


@pytest.mark.parametrize("name, resample, mean, std", [
  ("SiglipImageProcessor", "bicubic", HALF, HALF),
  ("CLIPImageProcessor", "crop_bicubic", CLIP_MEAN, CLIP_STD),
  ("BitImageProcessor", "crop_bicubic", CLIP_MEAN, CLIP_STD),
  ("ViTImageProcessor", "bilinear", HALF, HALF),
])  # fmt: skip
@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
def test_absent_keys_are_the_defaults_of_the_class(
  tmp_path, name, resample, mean, std, suffix
):
  found = _read(tmp_path, image_processor_type=name + suffix)
  assert found == (resample, 224, mean, std)
  nulls = dict(resample=None, size=None, image_mean=None, do_resize=None)
  assert _read(tmp_path, image_processor_type=name, **nulls) == found
  # The same from the file that transformers itself writes.
  kinds = {
    "SiglipImageProcessor": transformers.SiglipImageProcessorPil,
    "CLIPImageProcessor": transformers.CLIPImageProcessorPil,
    "BitImageProcessor": transformers.BitImageProcessorPil,
    "ViTImageProcessor": transformers.ViTImageProcessorPil,
  }
  kinds[name]().save_pretrained(tmp_path)
  assert processor.read(tmp_path) == found


@pytest.mark.parametrize("fields, resample, size", [
  # SigLIP as published, a Fast one, and one of transformers 4.
  (dict(image_processor_type="SiglipImageProcessor", resample=3,
        size={"height": 384, "width": 384}), "bicubic", 384),
  (dict(image_processor_type="SiglipImageProcessorFast", resample=2,
        size={"height": 256, "width": 256}, do_center_crop=None),
   "bilinear", 256),
  # CLIP in its old and its new form.
  (dict(feature_extractor_type="CLIPFeatureExtractor", size=224, crop_size=224,
        do_center_crop=True, resample=3), "crop_bicubic", 224),
  (dict(image_processor_type="CLIPImageProcessor", do_center_crop=True,
        size={"shortest_edge": 336, "longest_edge": None},
        crop_size={"height": 336, "width": 336}), "crop_bicubic", 336),
  (dict(image_processor_type="CLIPImageProcessor", do_center_crop=False,
        size={"height": 98, "width": 98}), "bicubic", 98),
  (dict(image_processor_type="CLIPImageProcessor",
        size={"height": 224, "width": 224}), "bicubic", 224),
  # DINOv2.
  (dict(image_processor_type="BitImageProcessor", resample=3,
        size={"shortest_edge": 256}, do_center_crop=True,
        crop_size={"height": 224, "width": 224}), "crop_bicubic:256", 224),
  (dict(image_processor_type="BitImageProcessor", resample=1, size=248),
   "crop_lanczos:248", 224),
  # ViT and MAE.
  (dict(feature_extractor_type="ViTFeatureExtractor", size=224, resample=2),
   "bilinear", 224),
  (dict(image_processor_type="ViTImageProcessor", size=384, resample=3),
   "bicubic", 384),
  # No class named.
  (dict(resample=2), "bilinear", 224),
  (dict(resample=3, do_center_crop=False), "bicubic", 224),
  (dict(resample=3, do_center_crop=True), "crop_bicubic", 224),
  (dict(size=64), "bicubic", 64),
  (dict(size=256, crop_size=224), "crop_bicubic:256", 224),
  (dict(size={"shortest_edge": 224}), "crop_bicubic", 224),
])  # fmt: skip
def test_files_of_published_encoders_are_read(tmp_path, fields, resample, size):
  found = _read(tmp_path, do_convert_rgb=True, do_pad=False, **fields)
  assert (found.resample, found.size) == (resample, size)


def test_what_is_read_frames_as_transformers_does(tmp_path):
  fields = dict(
    image_processor_type="BitImageProcessor",
    size=25,
    crop_size=21,
    resample=2,
    do_normalize=False,
    do_rescale=False,
  )
  _write(tmp_path, **fields)
  theirs = transformers.AutoImageProcessor.from_pretrained(
    tmp_path, backend="pil"
  )
  found = _read(tmp_path, **fields | {"do_rescale": True})
  assert found == ("crop_bilinear:25", 21, (0.0,) * 3, (1.0,) * 3)
  noise = np.random.default_rng(0).integers(0, 256, (40, 33, 3), np.uint8)
  got = theirs(Image.fromarray(noise), return_tensors="np")["pixel_values"]
  ours = images.preprocess([noise], found.size, resample=found.resample)
  np.testing.assert_array_equal(ours, got.transpose(0, 2, 3, 1))


def test_the_nested_processor_comes_first_as_in_transformers(tmp_path):
  _write(tmp_path, size=64)
  inner = {"image_processor_type": "SiglipImageProcessor", "size": {}}
  inner["size"] = {"height": 32, "width": 32}
  _write(tmp_path, "processor_config.json", image_processor=inner)
  assert processor.read(tmp_path).size == 32
  theirs = transformers.AutoImageProcessor.from_pretrained(
    tmp_path, backend="pil"
  )
  assert theirs.size["height"] == 32
  inner["do_resize"] = False
  _write(tmp_path, "processor_config.json", image_processor=inner)
  said = r"processor_config.json: image_processor.do_resize is False"
  with pytest.raises(errors.InputError, match=said):
    processor.read(tmp_path)
  _write(tmp_path, "processor_config.json", image_processor="x")
  with pytest.raises(errors.InputError, match="holds no JSON object"):
    processor.read(tmp_path)


def test_statistics_are_read_for_all_channels(tmp_path):
  found = _read(tmp_path, image_mean=[0.1, 0.2, 0.3], image_std=0.25)
  assert found.mean == (0.1, 0.2, 0.3) and found.std == (0.25,) * 3
  assert _read(tmp_path, rescale_factor=0.003921568859368563).mean == HALF


@pytest.mark.parametrize("fields, said", [
  (dict(do_resize=False), "do_resize is False; it must be true"),
  (dict(do_rescale=False), "do_rescale is False; it must be true"),
  (dict(rescale_factor=1), "rescale_factor is 1; only 1/255"),
  (dict(rescale_factor=1 / 127.5), "rescale_factor is 0.0078.*; only 1/255"),
  (dict(do_normalize="no"), "do_normalize is 'no'; it must be true or false"),
  (dict(do_pad=True), "do_pad is True; that is not done"),
  (dict(do_flip_channel_order=True), "do_flip_channel_order is True; that is"),
  (dict(use_square_size=True), "use_square_size is True; that is not done"),
  (dict(resample=0), r"resample is 0; it can be 3 \(bicubic\), 2"),
  (dict(resample="bicubic"), "resample is 'bicubic'; it can be 3"),
  (dict(size={"height": 224, "width": 196}), "size is .*; .* an equal width"),
  (dict(size={"longest_edge": 224}), "size is .* an equal width"),
  (dict(size=0), "size is 0; it must be a number of pixels"),
  (dict(size={"shortest_edge": 224}, do_center_crop=False), "size is .* cropped"
   " to None; images become square by a centre crop"),
  (dict(size={"shortest_edge": 200}, crop_size=224), "size is .* at most the"),
  (dict(size={"shortest_edge": 9, "longest_edge": 9}, crop_size=9), "size is"),
  (dict(size=224, crop_size={"height": 9, "width": 8}), "crop_size is .* equal"),
  (dict(size={"height": 64, "width": 64}, crop_size=56), "crop_size is 56 and"
   " size 64, squashed"),
  (dict(image_processor_type="SiglipImageProcessor", do_center_crop=True),
   "crop_size is None; it must be a number"),
  (dict(image_processor_type="SiglipImageProcessor", size=224), "size is .*"
   "shortest_edge"),
  (dict(image_processor_type="Siglip2ImageProcessor"), "image_processor_type is"
   " 'Siglip2ImageProcessor'; it can be SiglipImageProcessor, CLIPImage"),
  (dict(feature_extractor_type="DeiTFeatureExtractor"), "feature_extractor_type"
   " is 'DeiTFeatureExtractor'; it can be"),
  (dict(auto_map={"AutoImageProcessor": "x.Y"}), "auto_map names code"),
  (dict(image_mean=[0.5]), r"image_mean is \[0.5\]; it must be three numbers"),
  (dict(image_mean=["a"] * 3), "image_mean is .*; it must be three numbers"),
  (dict(image_std=[0.5, 0, 0.5]), "image_std is 0; it must be a number from 1e-06"),
], ids=str)  # fmt: skip
def test_what_is_not_done_here_is_refused_by_field(tmp_path, fields, said):
  with pytest.raises(
    errors.InputError, match=f"preprocessor_config.json: {said}"
  ) as error:
    _read(tmp_path, **fields)
  assert "\n" not in str(error.value)


FRAMINGS = [
  f"{crop}{kernel}"
  for kernel in ("bicubic", "bilinear", "lanczos")
  for crop in ("", "crop_")
] + ["crop_bicubic:33", "crop_bilinear:40", "crop_lanczos:29"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("resample", FRAMINGS)
def test_what_is_written_is_read_again_and_done_by_transformers(
  tmp_path, kind, resample
):
  given = processor.Processor(resample, 28, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
  _write(tmp_path, **processor.to_json(given, kind))
  assert processor.read(tmp_path) == given
  theirs = transformers.AutoImageProcessor.from_pretrained(
    tmp_path, backend="pil"
  )
  grey = np.random.default_rng(0).integers(0, 256, (41, 67), np.uint8)
  got = theirs(Image.fromarray(grey), return_tensors="np")["pixel_values"]
  pixels = images.preprocess([Image.fromarray(grey)], 28, resample=resample)
  ours = (pixels / 255 - given.mean) / given.std
  np.testing.assert_allclose(got.transpose(0, 2, 3, 1), ours, atol=1e-6)


def test_a_kind_is_written_with_its_own_class():
  def named(resample, kind):
    given = processor.Processor(resample, 28, HALF, HALF)
    return processor.to_json(given, kind)["image_processor_type"]

  assert {kind: named("bicubic", kind) for kind in KINDS} == {
    "siglip": "SiglipImageProcessor",
    "clip": "SiglipImageProcessor",
    "dinov2": "ViTImageProcessor",
    "vit": "ViTImageProcessor",
    "vit_mae": "ViTImageProcessor",
  }
  assert {kind: named("crop_bicubic", kind) for kind in KINDS} == {
    "siglip": "CLIPImageProcessor",
    "clip": "CLIPImageProcessor",
    "dinov2": "BitImageProcessor",
    "vit": "CLIPImageProcessor",
    "vit_mae": "CLIPImageProcessor",
  }


def test_what_cannot_be_written_is_refused():
  given = processor.Processor("crop_bicubic:20", 28, HALF, HALF)
  with pytest.raises(errors.InputError, match="edge below the size 28"):
    processor.to_json(given, "clip")
  with pytest.raises(errors.InputError, match="resample='cubic' is none of"):
    processor.to_json(given._replace(resample="cubic"), "clip")
  with pytest.raises(errors.InputError, match="kind 'sam'; choose .* vit_mae"):
    processor.to_json(given, "sam")
  # An edge that changes nothing is not kept.
  same = processor.to_json(given._replace(resample="crop_bicubic:28"), "clip")
  assert same == processor.to_json(
    given._replace(resample="crop_bicubic"), "clip"
  )
