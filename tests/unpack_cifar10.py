"""Unpacks the small CIFAR-10 archive into folders for a trial on real photos.

  python -m tests.unpack_cifar10 --data=DIR --to=DIR

reads `cifar10/cifar10_jpeg_4k_1k.npz` in the folder of test data and writes
TO/{train,val}/CLASS/NUMBER.jpg, the layout of `folders.ImageFolder`. The bytes
of the pictures are written as they are; no pickle is read.
"""

import argparse
import pathlib

import numpy as np


def unpack(archive: pathlib.Path, to: pathlib.Path) -> None:
  """Write the archive's train and test pictures as train and val."""
  with np.load(archive, allow_pickle=False) as arrays:
    classes = [str(name) for name in arrays["classes"]]
    for theirs, ours in (("train", "train"), ("test", "val")):
      data = arrays[f"{theirs}_jpeg"].tobytes()
      offsets = arrays[f"{theirs}_offsets"].tolist()
      labels = arrays[f"{theirs}_labels"].tolist()
      for name in classes:
        (to / ours / name).mkdir(parents=True, exist_ok=True)
      for index, label in enumerate(labels):
        picture = data[offsets[index] : offsets[index + 1]]
        path = to / ours / classes[label] / f"{index:05}.jpg"
        path.write_bytes(picture)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--data", type=pathlib.Path, required=True)
  parser.add_argument("--to", type=pathlib.Path, required=True)
  args = parser.parse_args()
  unpack(args.data / "cifar10" / "cifar10_jpeg_4k_1k.npz", args.to)


if __name__ == "__main__":
  main()
