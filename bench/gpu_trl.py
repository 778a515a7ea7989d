"""TRL's trainers on a GPU: `bench/trl_peers.py` with models of real size.

bfloat16 autocast, as TRL has it. "Tuned" switches off gradient checkpointing
and the regular log, "default" leaves both.
"""

import copy

import trl
from transformers import utils

from bench import budget, gpu_peers, gpu_sizes, torch_peers, trl_peers


def trainer(job: budget.Job, *, tuned: bool, attention: str = "sdpa") -> None:
  """Times TRL's trainer for the workload, DPO for pairs and else SFT."""
  if attention == "flash_attention_2" and not utils.is_flash_attn_2_available():
    job.save(skipped="flash-attn is not installed")
    return
  data = gpu_sizes.data(job.workload, tiny=job.tiny)
  batch, policy = gpu_peers.tensors(data), gpu_peers.model(data, attention)
  steps, count = budget.WARM_UP + job.steps, len(data.prompt)
  how = trl_peers.arguments(
    job.folder,
    steps=steps,
    batch=count,
    longest=batch.ids.shape[1],
    tuned=tuned,
    bf16=True,
  )
  how["learning_rate"] = gpu_peers.LEARNING_RATE
  clock, seen = budget.Clock(job, gpu_peers.wait), gpu_peers.Losses()
  common = dict(
    model=policy,
    processing_class=trl_peers.processor(data.vision["image_size"]),
    callbacks=[trl_peers.Clock(clock.begin, clock.end)],
  )
  if batch.pairs:
    inputs = batch.inputs | {"completion_mask": (batch.labels != -100).long()}
    made = trl_peers.Dpo(
      ref_model=copy.deepcopy(policy).eval(),
      args=trl.DPOConfig(beta=torch_peers.BETA, disable_dropout=True, **how),
      train_dataset=trl_peers.dataset(
        steps * count, "prompt", "chosen", "rejected"
      ),
      data_collator=lambda rows: dict(inputs),
      **common,
    )
  else:
    inputs = batch.inputs | {"labels": batch.labels}
    made = trl_peers.Sft(
      args=trl.SFTConfig(**how),
      train_dataset=trl_peers.dataset(steps * count, "prompt", "completion"),
      data_collator=lambda rows: dict(inputs),
      **common,
    )
  made.seen = seen
  made.train()
  seen.save(job)
