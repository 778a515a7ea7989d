"""The gate of the benchmark on a GPU: both sides on equal weights, small.

The toy of `bench/toy.py` on the device that is timed, with the loop of
`bench/gpu_peers.py` and the package's own update: in float32, and as timed in
bfloat16 with the attention that is timed. Torch in float32 is what both
precisions are compared with. Only numbers: nothing is timed here.
"""

import pathlib
from collections.abc import Mapping

import numpy as np

from bench import budget, gpu_sizes, side_by_side, toy, verdict

# Relative, see `verdict.errors`. A DPO loss is a difference of sums near -290,
# and AdamW divides by the size of a gradient: of bfloat16 no update is asked.
LIMITS: Mapping[str, Mapping[str, float]] = {
  "float32": {"logps": 1e-4, "loss": 1e-2, "grad_norm": 1e-2, "update": 5e-2},
  "bfloat16": {"logps": 5e-3, "loss": 1e-2, "grad_norm": 1e-2},
}
_TINY = {"pairs": 2, "answer": 8, "image": 64, "layers": 2}


def theirs(job: budget.Job) -> None:
  """Writes the toy and what torch makes of it."""
  import torch

  from bench import gpu_peers, torch_peers

  # Convolutions would round their inputs otherwise.
  torch.backends.cudnn.allow_tf32 = False
  toy.write(job.folder, _TINY if job.tiny else toy.OPTIONS, answers=2)
  data = toy.read(job.folder)
  for name in LIMITS:
    model = torch_peers.load(data)
    seen = torch_peers.Seen(model)
    batch = gpu_peers.tensors(_as_data(data))
    loop = gpu_peers.Loop(
      model,
      batch,
      seen=seen,
      rate=torch_peers.LEARNING_RATE,
      bf16=name == "bfloat16",
    )
    seen.score(loop.logps()[:, None])
    for _ in range(side_by_side.GATE_STEPS):
      loop.step()
    np.savez(_kept(job.folder, name), **seen.numbers())
  _compare(job, {"bfloat16": np.load(_kept(job.folder, "bfloat16"))})


def ours(job: budget.Job) -> None:
  """Compares what the package makes of the toy."""
  from bench import dpo_ladder, gpu_ours

  found = {}
  for name in LIMITS:
    # cuDNN's attention has no float32.
    attention = {"attention": "xla"} if name == "float32" else {}
    compute = gpu_ours.settings(dtype=name, **attention)
    with gpu_ours.exact(name):
      ready = dpo_ladder.cached(job.folder, compute)
      ready.drive(side_by_side.GATE_STEPS, _nothing, _nothing)
      found[name] = ready.numbers()
    job.save(attention=compute.attention)
  _compare(job, found)


def _compare(job: budget.Job, found) -> None:
  right = np.load(_kept(job.folder, "float32"))
  failures, errors = [], {}
  for name, numbers in found.items():
    errors[name] = verdict.errors(numbers, right)
    failures += [
      f"{name}: {line}" for line in verdict.failures(errors[name], LIMITS[name])
    ]
  job.save(errors=errors, failures=failures)


def _kept(folder: pathlib.Path, name: str) -> pathlib.Path:
  return folder / f"gate_{name}.npz"


def _as_data(data: toy.Toy) -> gpu_sizes.Data:
  return gpu_sizes.Data(
    vision={"image_size": data.sizes["image"], "patch_size": toy.PATCH},
    llm={"vocab_size": toy.VOCAB},
    prompt=list(data.prompt),
    chosen=list(data.chosen),
    rejected=list(data.rejected),
    images=data.images,
  )


def _nothing() -> None:
  pass
