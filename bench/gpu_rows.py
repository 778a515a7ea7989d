"""The rows of the benchmark on a GPU, in the order of their importance.

Names and settings alone; what runs is imported in a row's own process.
"""

import dataclasses
from collections.abc import Callable, Mapping

from bench import budget


@dataclasses.dataclass(frozen=True)
class Row:
  """One row.

  run: does it, in a process of its own. seconds: the most it may take, of which
  starting, making weights and compiling are a part. steps: timed ones. memory:
  GB of the device below which it is not tried. tiny: whether a CPU tries it,
  to go through the code if not through all settings. part: a step is
  not a whole update.
  """

  name: str
  label: str
  run: Callable[[budget.Job], None]
  workload: str = ""
  settings: str = ""
  seconds: float = 100.0
  steps: int = 10
  memory: float = 0.0
  tiny: bool = False
  part: bool = False

  @property
  def side(self) -> str:
    """Whose row it is: "trl", "torch" or "ours"."""
    first = self.name.split("_")[0]
    return first if first in ("trl", "torch") else "ours"


def _ours(name, label, settings="", *, workload="dpo_8", how=None, **fields):
  def run(job):
    from bench import gpu_ours

    gpu_ours.update(job, **(how or {}))

  return Row(name, label, run, workload, settings, **fields)


def _torch(name, label, settings, *, workload="dpo_8", how=None, **fields):
  def run(job):
    from bench import gpu_peers

    gpu_peers.loop(job, **(how or {}))

  return Row(name, label, run, workload, settings, **fields)


def _trl(name, label, settings, *, workload="dpo_8", how=None, **fields):
  def run(job):
    from bench import gpu_trl

    gpu_trl.trainer(job, **(how or {}))

  return Row(name, label, run, workload, settings, **fields)


def _device(job):
  from bench import gpu_device, gpu_sizes

  works = {n: gpu_device.work(n, tiny=job.tiny) for n in gpu_sizes.WORKLOADS}
  job.save(works=works)
  gpu_device.ceilings(job)


def _gate_torch(job):
  from bench import gpu_gate

  gpu_gate.theirs(job)


def _gate_ours(job):
  from bench import gpu_gate

  gpu_gate.ours(job)


def _reference(job):
  from bench import gpu_ours

  gpu_ours.reference(job)


# No rows of the table: what a step does and the ceilings, then the gate.
BEFORE = (
  Row("device", "", _device, seconds=60, steps=20),
  Row("gate_torch", "", _gate_torch, seconds=90),
  Row("gate_ours", "", _gate_ours, seconds=180),
)

_TRAINER = (
  "float32 weights, bfloat16 autocast, fused AdamW, fixed tensors on the device"
  " from the collator, max_length raised, no dropout"
)
_LOOP = (
  "float32 weights, bfloat16 autocast, sdpa without a mask, logits of the"
  " answers alone in chunks, fused AdamW, no checkpointing of blocks"
)
_PAIRS = f"reference model in every step; {_LOOP}"
_DEFAULT = f"gradient checkpointing, a log every 10 steps, sdpa; {_TRAINER}"
_TUNED = f"no gradient checkpointing, no log, sdpa; {_TRAINER}"
_TRL = dict(how=dict(tuned=False))
_FAST = dict(how=dict(tuned=True))
_IN_STEP = "reference model in every step, its kernels in bfloat16"
_FEWER = dict(steps=6, seconds=90.0)
_TINY = dict(tiny=True)

ROWS = (
  _ours("ours_8", "pivot_jax", "no remat", seconds=200, steps=20, **_TINY),
  _trl("trl_8", "TRL DPOTrainer, default", _DEFAULT, **_TRL, **_TINY),
  _trl("trl_tuned_8", "TRL DPOTrainer, tuned", _TUNED, **_FAST),
  _ours(
    "ours_again",
    "pivot_jax again",
    "no remat, compiled code at hand",
    # A program from the cache was looked at when it was compiled.
    how=dict(look=False),
    steps=20,
    **_TINY,
  ),
  _ours(
    "ours_attention",
    "remat attention",
    "blocks computed again but for what attention gives out",
    how=dict(remat="attention"),
    **_FEWER,
  ),
  _ours(
    "sft",
    "pivot_jax SFT",
    "no remat",
    workload="sft_16",
    how=dict(rung="sft"),
    **_TINY,
  ),
  _torch("torch_8", "torch loop", _PAIRS),
  _ours("ours_16", "pivot_jax", "no remat", workload="dpo_16", steps=20),
  _torch("torch_sft", "torch loop SFT", _LOOP, workload="sft_16", **_TINY),
  _ours(
    "ours_naive",
    "naive",
    f"two sequences, two encodes; {_IN_STEP}; no remat",
    how=dict(rung="naive"),
    **_FEWER,
    **_TINY,
  ),
  _torch(
    "torch_compiled_8",
    "torch loop, compiled",
    f"torch.compile of every block; {_PAIRS}",
    how=dict(compiled=True),
    **_TINY,
  ),
  _ours(
    "ours_image_once",
    "+ image once",
    f"two sequences, one encode; {_IN_STEP}; no remat",
    how=dict(rung="image_once"),
    **_FEWER,
  ),
  _ours(
    "ours_prompt_once",
    "+ prompt once",
    f"one packed row, one encode; {_IN_STEP}; no remat",
    how=dict(rung="prompt_once"),
    **_FEWER,
  ),
  Row(
    "ours_reference",
    "(reference pass, once)",
    _reference,
    "dpo_8",
    "what the score stage does",
    part=True,
    **_FEWER,
    **_TINY,
  ),
  _ours(
    "ours_xla",
    "attention by XLA",
    "no remat",
    how=dict(attention="xla"),
    **_FEWER,
  ),
  _ours(
    "ours_moments",
    "bfloat16 moments",
    "no remat",
    how=dict(moments="bfloat16"),
    **_FEWER,
  ),
  _ours(
    "ours_ragged",
    "pivot_jax, ragged",
    "no remat; as many pairs in a row as the longest one leaves room for",
    workload="dpo_ragged",
    **_FEWER,
    **_TINY,
  ),
  _trl(
    "trl_ragged",
    "TRL tuned, ragged",
    _TUNED,
    workload="dpo_ragged",
    **_FAST,
  ),
  _ours(
    "ours_large",
    "pivot_jax, 7B",
    "So400m and Qwen2.5-7B, bfloat16 moments, remat attention",
    workload="dpo_4_large",
    how=dict(moments="bfloat16", remat="attention"),
    memory=120.0,
    seconds=180,
    steps=3,
  ),
  _ours("ours_full", "remat full", how=dict(remat="full"), **_FEWER),
  _trl(
    "trl_flash_8",
    "TRL tuned, flash-attn",
    f"flash_attention_2 for sdpa, else as tuned: {_TUNED}",
    how=dict(tuned=True, attention="flash_attention_2"),
    **_TINY,
  ),
  _trl(
    "trl_sft",
    "TRL SFTTrainer, tuned",
    _TUNED,
    workload="sft_16",
    **_FAST,
    **_TINY,
  ),
  _trl(
    "trl_16", "TRL DPOTrainer, default", _DEFAULT, workload="dpo_16", **_TRL
  ),
  _trl(
    "trl_tuned_16",
    "TRL DPOTrainer, tuned",
    _TUNED,
    workload="dpo_16",
    **_FAST,
  ),
  _torch("torch_16", "torch loop", _PAIRS, workload="dpo_16"),
)


def by_name() -> Mapping[str, Row]:
  """Returns every row, those before the timed ones too."""
  return {row.name: row for row in (*BEFORE, *ROWS)}
