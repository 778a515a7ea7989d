"""TRL's trainer on a GPU: `bench/update/trl_peer.py` at real size.

bfloat16 autocast, as TRL has it. "Tuned" switches off gradient checkpointing
and the regular log, "default" leaves both.
"""

import copy
import pathlib

import trl

from bench import harness
from bench.gpu import sizes, torch_peer
from bench.update import torch_peer as toy_peer
from bench.update import trl_peer


def update(
  folder: pathlib.Path, workload: str, *, tuned: bool
) -> harness.Ready:
  """Return TRL's DPO trainer for the workload."""
  data = sizes.data(workload, tiny=bool(harness.options(folder)["tiny"]))
  batch, policy = torch_peer.tensors(data), torch_peer.model(data)
  seen, count = torch_peer.Losses(), len(data.prompt)

  def drive(steps, begin, end):
    how = trl_peer.arguments(
      folder,
      steps=steps,
      batch=count,
      longest=batch.ids.shape[1],
      tuned=tuned,
      bf16=True,
    )
    how["learning_rate"] = torch_peer.LEARNING_RATE
    clock = trl_peer.Clock(
      torch_peer.waiting(begin), lambda: (torch_peer.wait(), end())
    )
    made = _trainer(policy, batch, steps * count, how, clock, data)
    made.seen = seen
    made.train()

  return harness.Ready(drive, facts=seen.facts)


def _trainer(policy, batch, rows: int, how, clock, data: sizes.Data):
  inputs = batch.inputs | {"completion_mask": (batch.labels != -100).long()}
  return trl_peer.Dpo(
    model=policy,
    ref_model=copy.deepcopy(policy).eval(),
    args=trl.DPOConfig(beta=toy_peer.BETA, disable_dropout=True, **how),
    train_dataset=trl_peer.dataset(rows, "prompt", "chosen", "rejected"),
    data_collator=lambda _: dict(inputs),
    processing_class=trl_peer.processor(data.vision["image_size"]),
    callbacks=[clock],
  )


MAKERS = {"update": update}
