"""TensorBoard's share: numbers, images and texts of rows, in an event file."""

import io
import struct

import numpy as np
from PIL import Image
from tensorboardX.proto import event_pb2

from pivot_jax import metrics


def events(folder):
  """Return the events of the one file in a folder."""
  (path,) = (folder / "tensorboard").iterdir()
  data, found = path.read_bytes(), []
  while data:
    (size,) = struct.unpack_from("<Q", data)
    found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
    data = data[12 + size + 4 :]
  return found


def test_numbers_images_and_texts_are_written(tmp_path):
  writer = metrics.Writer(tmp_path, step=0, writers=("tensorboard",))
  image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
  writer.write_samples([("row-1", (image, image), "what <b>?\nred")])
  writer.write(3, {"losses/total": 0.25})
  writer.close()
  values = {
    value.tag: (event.step, value)
    for event in events(tmp_path)
    for value in event.summary.value
  }
  assert set(values) == {
    "losses/total",
    "samples/0/image0",
    "samples/0/image1",
    "samples/0/text/text_summary",
  }
  step, number = values["losses/total"]
  assert (step, number.simple_value) == (3, 0.25)
  encoded = values["samples/0/image1"][1].image.encoded_image_string
  np.testing.assert_array_equal(Image.open(io.BytesIO(encoded)), image)
  (text,) = values["samples/0/text/text_summary"][1].tensor.string_val
  assert text.decode() == "row-1\n\n    what <b>?\n    red"


def test_without_tensorboard_no_sample_is_written(tmp_path):
  writer = metrics.Writer(tmp_path, step=0)
  writer.write_samples([("row-1", (), "text")])
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
