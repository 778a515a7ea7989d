"""Runs pivot_jax.main, with faults and counts that the variable DRIVEN asks for.

DRIVEN is a JSON object; of it, each for one process, by its number as text:

  pause       seconds that each update of a training waits, in all
  fail        {process: n}: the n-th row that it decodes raises InputError
  hang        {process: n}: the n-th row that it decodes never comes
  counts      a folder: PROCESS.json is written there, of rows read, and files
              below the work folder opened to be written
  version     {process: text}: what jax's version is taken to be
  source      {process: text}: what the hash of a source file is taken to be
"""

import collections
import importlib.metadata
import json
import os
import pathlib
import sys
import time

from pivot_jax import main, processes
from pivot_jax.data import streams
from pivot_jax.data.rows import Made
from pivot_jax.errors import InputError
from pivot_jax.recipe import agreement
from pivot_jax.training import recorder

ASKED = json.loads(os.environ.get("DRIVEN", "{}"))
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def of_process(name):
  """Return what is asked of this process, None if nothing is."""
  return ASKED.get(name, {}).get(str(processes.index()))


class Counts:
  """Rows read by source, and files written."""

  def __init__(self):
    self.rows = collections.Counter()
    self.images = collections.Counter()
    self.written = []

  def see(self, event, values):
    """Note a file that is opened to be written (an audit hook)."""
    if event != "open" or not isinstance(values[0], (str, bytes)):
      return
    path, mode, flags = values
    writes = bool(mode and set(mode) & set("wax+")) or bool(flags & _WRITES)
    if writes:
      self.written.append(os.fsdecode(path))

  def save(self, workdir):
    folder = pathlib.Path(ASKED["counts"])
    inside = [x for x in self.written if x.startswith(f"{workdir}/")]
    content = {"rows": self.rows, "images": self.images, "written": inside}
    place = folder / f"{processes.index()}.json"
    place.write_text(json.dumps(content))


counts = Counts()
plain_read, plain_get = streams.Stream.read, Made.__getitem__
plain_metrics, plain_finish = recorder.Recorder.metrics, processes.finish
plain_version = importlib.metadata.version


def read(self, place, *, pixels=True):
  counts.rows["pixels" if pixels else "texts"] += 1
  if pixels and of_process("fail") == counts.rows["pixels"]:
    raise InputError("rows.jsonl:3: 'image': no such file")
  if pixels and of_process("hang") == counts.rows["pixels"]:
    time.sleep(1000)
  return plain_read(self, place, pixels=pixels)


def get(self, index):
  counts.images[f"{self.name(0)}"] += 1
  return plain_get(self, index)


def metrics(self, step, *values):
  sys.stderr.write(f"at update {step}\n")
  sys.stderr.flush()
  time.sleep(ASKED.get("pause", 0.0))
  return plain_metrics(self, step, *values)


def finish():
  if "counts" in ASKED:
    words = [x for x in sys.argv if x.startswith("--workdir=")]
    counts.save(words[-1].partition("=")[2])
  plain_finish()


def version(name):
  told = of_process("version")
  return told if told and name == "jax" else plain_version(name)


def drive():
  """Put the faults in place and run."""
  streams.Stream.read, Made.__getitem__ = read, get
  recorder.Recorder.metrics = metrics
  processes.finish = finish
  importlib.metadata.version = version
  plain_files = agreement._source_files

  def source_files(steps):
    told = of_process("source")
    found = plain_files(steps)
    return found | ({"training/losses.py": told} if told else {})

  agreement._source_files = source_files
  if "counts" in ASKED:
    sys.addaudithook(counts.see)
  main.run()


if __name__ == "__main__":
  drive()
