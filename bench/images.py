"""Images a second on one core, from file to pixels, beside Pillow alone.

  python -m bench.images

Needs `pip install -e ".[bench]"`. Files are JPEGs of quality 88, made here to
be like photographs in size, and lie in the page cache; an image is read,
decoded and squashed to 384 x 384 by Pillow's bicubic filter, uint8. *Pillow
alone* is that in one line, without a limit, a check of the path or a message.
One process, one core: the variants take turns, a round of all files each, in an
order that moves on. Nothing is timed unless `pil` gave Pillow's pixels bit for
bit and the decoder that decodes smaller is as close as it is said to be.
Rates are of CPU seconds: a core that others use too counts as less of one.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, features

from bench import results, verdict
from pivot_jax.data import images

SIZES = ((640, 480), (1024, 768), (2048, 1536))
SIDE, QUALITY = 384, 88
FILES, WARM_UP, ROUNDS = 8, 2, 20
# Of pixels decoded smaller, in grey levels and decibels; see `images.DECODERS`.
MEAN, MOST, LEAST_PSNR = 2.0, 60.0, 37.0
OVERHEAD, EXACT, FASTEST = 1.1, 200.0, 400.0
ALONE = "Pillow alone"

Read = Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
  """One variant on files of one size; seconds are of one image, by rounds.

  `off` says how the pixels differ from Pillow's: mean and largest absolute
  difference, in grey levels, and the peak signal-to-noise ratio in decibels.
  """

  size: str
  name: str
  walls: tuple[float, ...]
  cpus: tuple[float, ...]
  off: Mapping[str, float]

  @property
  def rate(self) -> float:
    """Images in a second of CPU time, which is what a free core does."""
    return 1 / float(np.median(self.cpus))


def photograph(
  rng: np.random.Generator, width: int, height: int
) -> Image.Image:
  """Return random fields, the finer the fainter, under a sensor's noise."""
  pixels = np.full((height, width, 3), 128, np.float32)
  for cells in (4, 8, 16, 32, 64):
    shape = (cells * 3 // 4 + 1, cells + 1, 3)
    field = rng.normal(size=shape).astype(np.float32) * 60 * (4 / cells) ** 0.7
    pixels += np.stack(
      [
        Image.fromarray(field[..., c]).resize(
          (width, height), Image.Resampling.BICUBIC
        )
        for c in range(3)
      ],
      axis=-1,
    )
  pixels += rng.normal(scale=9.2, size=pixels.shape)
  return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def pillow_alone(folder: pathlib.Path, relative: str) -> np.ndarray:
  """Return pixels as a bare loop reads them."""
  image = Image.open(f"{folder}/{relative}").convert("RGB")
  return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def variants(folder: pathlib.Path) -> dict[str, Read]:
  """Return the ways to read a file of the folder, Pillow alone first."""
  ours = {
    decoder: images.Pictures(
      folder, images.ImageSpec(SIDE, decoder=decoder)
    ).read
    for decoder in images.DECODERS
  }
  decoded = {p.name: Image.open(p).convert("RGB") for p in folder.iterdir()}

  def resize_alone(relative):
    image = decoded[relative]
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))

  return {
    ALONE: functools.partial(pillow_alone, folder),
    "its resize": resize_alone,
  } | ours


def difference(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
  """Return the distance to the exact pixels, as `Row.off` has it."""
  off = found.astype(np.float64) - exact
  square = float(np.square(off).mean())
  return {
    "mean": float(np.abs(off).mean()),
    "max": float(np.abs(off).max()),
    "psnr": 10 * np.log10(255**2 / square) if square else float("inf"),
  }


def failures(off: Mapping[str, Mapping[str, float]]) -> list[str]:
  """Return a line for every variant that is too far from Pillow's pixels."""
  lines = []
  for name, one in off.items():
    exact = name not in images.DECODERS or name == "pil"
    mean, most, psnr = (0, 0, np.inf) if exact else (MEAN, MOST, LEAST_PSNR)
    # Written so that nan fails.
    if not (one["mean"] <= mean and one["max"] <= most and one["psnr"] >= psnr):
      lines.append(f"{name} is off by {_difference(one)}")
  return lines


def measure(
  folder: pathlib.Path, size: tuple[int, int], rounds: int
) -> list[Row]:
  """Write files, open the gate and time every variant on them."""
  label = f"{size[0]}x{size[1]}"
  rng = np.random.default_rng(size)
  names = [f"{label}-{i}.jpg" for i in range(FILES)]
  for name in names:
    photograph(rng, *size).save(folder / name, quality=QUALITY)
  reads = variants(folder)
  pixels = {
    variant: np.stack([read(name) for name in names])
    for variant, read in reads.items()
  }
  exact = pixels[ALONE]
  off = {name: difference(found, exact) for name, found in pixels.items()}
  if lines := failures(off):
    sys.exit(f"images: no timings, at {label} {'; '.join(lines)}")
  seconds = {name: [] for name in reads}
  for turn in range(WARM_UP + rounds):
    order = list(reads)[turn % len(reads) :] + list(reads)[: turn % len(reads)]
    for name in order:
      seconds[name].append(_timed(reads[name], names))
  return [
    Row(label, name, *zip(*taken[WARM_UP:], strict=True), off[name])
    for name, taken in seconds.items()
  ]


def _timed(read: Read, names: Sequence[str]) -> tuple[float, float]:
  """Return the wall and CPU seconds of one image."""
  wall, cpu = time.perf_counter(), time.process_time()
  for name in names:
    read(name)
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  return wall / len(names), cpu / len(names)


def compared(rows: Sequence[Row]) -> dict[str, dict[str, tuple]]:
  """Return {size: {variant: time over Pillow's alone}}: p10, median, p90.

  CPU seconds of rounds are compared one by one, so that what slows the machine
  for some time slows both sides.
  """
  alone = {row.size: row.cpus for row in rows if row.name == ALONE}
  found: dict[str, dict[str, tuple]] = {}
  for row in rows:
    ratios = np.divide(row.cpus, alone[row.size])
    found.setdefault(row.size, {})[row.name] = verdict.spread(ratios)
  return found


def table(rows: Sequence[Row], kilobytes: Mapping[str, float]) -> str:
  """Return the rows as a Markdown table."""
  ratios = compared(rows)
  head = ["file", "variant", "images/CPU s", "p10–p90", "images/s"]
  lines = [[*head, "time, Pillow alone = 1", "p10–p90", "pixels differ"]]
  for row in rows:
    low, _, high = verdict.spread(row.cpus)
    first, middle, last = ratios[row.size][row.name]
    lines.append([
      f"{row.size}, {kilobytes[row.size]:.0f} KB",
      row.name,
      f"{row.rate:.0f}",
      f"{1 / high:.0f}–{1 / low:.0f}",
      f"{1 / np.median(row.walls):.0f}",
      f"{middle:.3f}",
      f"{first:.3f}–{last:.3f}",
      _difference(row.off),
    ])  # fmt: skip
  return verdict.markdown(lines)


def _difference(off: Mapping[str, float]) -> str:
  if not off["max"]:
    return "not at all"
  return (
    f"{off['mean']:.2f} in the mean, {off['max']:.0f} at most,"
    f" {off['psnr']:.1f} dB"
  )


def goals(rows: Sequence[Row]) -> list[str]:
  """Return a line for each goal."""
  ratios = compared(rows)
  lines = [
    verdict.goal(
      f"time of `pil` at {size}, Pillow alone = 1",
      ratios[size]["pil"][1],
      OVERHEAD,
      least=False,
    )
    for size in ratios
  ]
  for row in rows:
    if row.size == "640x480" and row.name in images.DECODERS:
      limit = EXACT if row.name == "pil" else FASTEST
      said = f"images/CPU s of `{row.name}` at {row.size}"
      lines.append(verdict.goal(said, row.rate, limit))
  return lines


def main() -> None:
  """Measure all sizes and write images.md and images.json."""
  parser = argparse.ArgumentParser(prog="python -m bench.images")
  parser.add_argument("--out", type=pathlib.Path, default="bench/results")
  parser.add_argument("--rounds", type=int, default=ROUNDS)
  flags = parser.parse_args()
  report = results.Report(
    results.command("images", flags, {"rounds": ROUNDS}),
    software=results.versions(("numpy", "pillow"))
    | {"Pillow's libjpeg-turbo": features.version_feature("libjpeg_turbo")},
  )
  # The last core: the first ones serve the system's interrupts.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
  rows, kilobytes = [], {}
  for size in SIZES:
    with tempfile.TemporaryDirectory() as folder:
      found = measure(pathlib.Path(folder), size, flags.rounds)
      sizes = [p.stat().st_size for p in pathlib.Path(folder).iterdir()]
    rows += found
    kilobytes[found[0].size] = float(np.mean(sizes)) / 1000
  report.publish(
    flags.out,
    "images",
    table(rows, kilobytes),
    "\n".join(goals(rows)),
    f"JPEG of quality {QUALITY} to uint8 [{SIDE}, {SIDE}, 3], bicubic. Medians"
    f" of {flags.rounds} rounds over {FILES} files after {WARM_UP} of warm-up,"
    " all variants in turn in one process; CPU times are compared round by"
    " round; *its resize* is the part of Pillow alone that follows the"
    " decoding. Before that `pil` gave Pillow's pixels bit for bit, and"
    f" `pil_draft` was within {MEAN:g} grey levels in the mean, {MOST:g} at most"
    f" and {LEAST_PSNR:g} dB.",
    machine=", one core",
    files=FILES,
    rounds=flags.rounds,
    warm_up_rounds=WARM_UP,
    limits={"mean": MEAN, "max": MOST, "psnr": LEAST_PSNR},
    kilobytes=kilobytes,
    rows=[_plain(row) for row in rows],
    compared=compared(rows),
  )


def _plain(row: Row) -> dict[str, Any]:
  """Return a row for JSON, which has no infinity: no difference is null."""
  off = {k: v if np.isfinite(v) else None for k, v in row.off.items()}
  return dataclasses.asdict(row) | {"off": off}


if __name__ == "__main__":
  main()
