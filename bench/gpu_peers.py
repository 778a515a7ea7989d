"""The peer in plain torch on a GPU: transformers' Llava in a loop.

float32 weights and AdamW under bfloat16 autocast, weights made on the device.
The tower has the 26 blocks that are read, none behind them. The loop computes
as TRL does (`bench/gpu_trl.py`): every answer is a sequence with its image, the
reference model runs in every step. What is known to be fast is on: logits of
the answers alone, no mask where the padding is behind (a causal kernel without
one), fused AdamW.

S sequences (chosen ones first), T tokens, M answer tokens, E width.
"""

import copy
import dataclasses
import os

import numpy as np
import torch
import torch.utils.checkpoint
import transformers
from transformers import modeling_layers

from bench import budget, gpu_sizes, torch_peers

LEARNING_RATE = 1e-6
# Positions that have logits at a time.
CHUNK = 2048
DEVICE = torch_peers.DEVICE


@dataclasses.dataclass(frozen=True)
class Tensors:
  """A batch: ids, mask and labels [S, T], pixels [S, 3, H, W].

  Of the answers' tokens, [M]: `source` in the flat [S * T] predicts `target`,
  in sequence `sequence`. `pairs` says whether the second half is rejected.
  """

  pairs: bool
  ids: torch.Tensor
  mask: torch.Tensor
  labels: torch.Tensor
  pixels: torch.Tensor
  source: torch.Tensor
  target: torch.Tensor
  sequence: torch.Tensor

  @property
  def inputs(self) -> dict[str, torch.Tensor]:
    """What a collator of TRL's gives to either trainer."""
    return {
      "input_ids": self.ids,
      "attention_mask": self.mask,
      "pixel_values": self.pixels,
    }


def tensors(data: gpu_sizes.Data) -> Tensors:
  """Returns the batch on the device, padded behind as TRL pads."""
  if os.environ.get("CUDA_VISIBLE_DEVICES") and DEVICE != "cuda":
    # What ran on the CPU would be believed.
    raise RuntimeError("torch sees no GPU: install a build of it for CUDA")
  image = np.full(data.patches, data.image_id)
  columns = {"chosen": data.chosen, "rejected": data.rejected}
  rows = [
    (np.concatenate([image, prompt]), answer)
    for name in data.answers
    for prompt, answer in zip(data.prompt, columns[name], strict=True)
  ]
  shape = (len(rows), max(len(p) + len(a) for p, a in rows))
  ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
  labels = np.full(shape, -100)
  for i, (prompt, answer) in enumerate(rows):
    end = len(prompt) + len(answer)
    ids[i, :end] = np.concatenate([prompt, answer])
    mask[i, :end] = 1
    labels[i, len(prompt) : end] = answer
  sequence, place = np.nonzero(labels != -100)
  scaled = (data.images / 255.0 - 0.5) / 0.5
  pixels = torch.tensor(scaled.transpose(0, 3, 1, 2), dtype=torch.float32)
  return Tensors(
    pairs=len(data.answers) == 2,
    ids=torch.tensor(ids).to(DEVICE),
    mask=torch.tensor(mask).to(DEVICE),
    labels=torch.tensor(labels).to(DEVICE),
    pixels=torch.cat([pixels] * len(data.answers)).to(DEVICE),
    source=torch.tensor(sequence * shape[1] + place - 1).to(DEVICE),
    target=torch.tensor(labels[sequence, place]).to(DEVICE),
    sequence=torch.tensor(sequence).to(DEVICE),
  )


def model(data: gpu_sizes.Data, attention: str = "sdpa"):
  """Returns a model of random float32 weights, made on the device."""
  vision = {
    name: data.vision[name]
    for name in (
      *("image_size", "patch_size", "hidden_size", "intermediate_size"),
      *("num_attention_heads", "hidden_act", "layer_norm_eps"),
    )
  }
  theta = data.llm["rope_theta"]
  text = {name: v for name, v in data.llm.items() if name != "rope_theta"}
  config = transformers.LlavaConfig(
    vision_config=transformers.SiglipVisionConfig(
      # The last block is not there: nothing reads it.
      num_hidden_layers=data.vision["num_hidden_layers"] - 1,
      vision_use_head=False,
      **vision,
    ),
    text_config=transformers.Qwen2Config(
      rope_parameters={"rope_type": "default", "rope_theta": theta},
      max_position_embeddings=4096,
      bos_token_id=None,
      eos_token_id=1,
      pad_token_id=0,
      **text,
    ),
    image_token_index=data.image_id,
    image_seq_length=data.patches,
    vision_feature_layer=-1,
    vision_feature_select_strategy="full",
    projector_hidden_act="gelu",
    tie_word_embeddings=data.llm["tie_word_embeddings"],
    attn_implementation=attention,
  )
  with torch.device(DEVICE):
    return transformers.LlavaForConditionalGeneration(config).train()


def token_logps(model, batch: Tensors) -> torch.Tensor:
  """Returns log p of the answers' tokens, [M]."""
  hidden = model.model(
    input_ids=batch.ids, pixel_values=batch.pixels, use_cache=False
  ).last_hidden_state
  picked = hidden.flatten(0, 1)[batch.source]
  weight = model.lm_head.weight
  # Logits of a chunk are not kept for the backward pass.
  return torch.cat(
    [
      torch.utils.checkpoint.checkpoint(
        _chunk_logps,
        rows,
        weight,
        target,
        use_reentrant=False,
        preserve_rng_state=False,
      )
      for rows, target in zip(
        picked.split(CHUNK), batch.target.split(CHUNK), strict=True
      )
    ]
  )


def _chunk_logps(hidden, weight, target):
  logits = torch.nn.functional.linear(hidden, weight).float()
  return -torch.nn.functional.cross_entropy(logits, target, reduction="none")


def answer_logps(model, batch: Tensors) -> torch.Tensor:
  """Returns the log-probability of every answer, [S]."""
  values = token_logps(model, batch)
  sums = torch.zeros(len(batch.ids), device=values.device)
  return sums.index_add(0, batch.sequence, values)


def dpo_loss(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
  """Returns the DPO loss of both models' log-probabilities [S]."""
  chosen, rejected = (policy - reference).chunk(2)
  scaled = torch_peers.BETA * (chosen - rejected)
  return -torch.nn.functional.logsigmoid(scaled).mean()


class Losses:
  """Loss and gradient norm of every step, on the device until asked for."""

  def __init__(self):
    self._losses, self._norms = [], []

  def add(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
    """Adds a step."""
    self._losses.append(loss.detach())
    self._norms.append(norm.detach())

  def save(self, job: budget.Job) -> None:
    """Says what the steps gave and how much memory they took."""
    losses = [float(x) for x in self._losses]
    norms = [float(x) for x in self._norms]
    found = dict(
      losses=losses,
      grad_norms=norms,
      finite=bool(np.isfinite(losses + norms).all()),
    )
    if DEVICE == "cuda":
      found |= dict(
        peak=torch.cuda.max_memory_allocated(),
        reserved=torch.cuda.max_memory_reserved(),
      )
    job.save(**found)


class Loop:
  """One update after the other, in plain torch."""

  def __init__(
    self, model, batch: Tensors, *, seen, rate: float, bf16: bool = True
  ):
    """Takes a model; `seen.add` is given each step's loss and norm."""
    self._model, self._batch, self._seen = model, batch, seen
    self._bf16, self._reference = bf16, None
    if batch.pairs:
      self._reference = copy.deepcopy(model).eval().requires_grad_(False)
    self._optimizer = torch.optim.AdamW(
      model.parameters(), lr=rate, weight_decay=0.0, fused=True
    )

  def compile(self, backend: str) -> None:
    """Has every block compiled on its first call, all with one program.

    As a whole the two models take torch minutes.
    """
    for owner in filter(None, (self._model, self._reference)):
      for module in owner.modules():
        if isinstance(module, modeling_layers.GradientCheckpointingLayer):
          module.compile(backend=backend)

  def logps(self) -> torch.Tensor:
    """Returns the log-probability of every answer, [S]."""
    with torch.no_grad(), self._autocast():
      return answer_logps(self._model, self._batch)

  def step(self) -> None:
    """Does an update."""
    self._optimizer.zero_grad(set_to_none=True)
    with self._autocast():
      loss = self._loss()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(
      self._model.parameters(), torch_peers.CLIP
    )
    self._optimizer.step()
    self._seen.add(loss, norm)

  def _autocast(self):
    return torch.autocast(DEVICE, torch.bfloat16, enabled=self._bf16)

  def _loss(self):
    if self._reference is None:
      return -token_logps(self._model, self._batch).mean()
    policy = answer_logps(self._model, self._batch)
    with torch.no_grad():
      fixed = answer_logps(self._reference, self._batch)
    return dpo_loss(policy, fixed)


def loop(job: budget.Job, *, compiled: bool = False) -> None:
  """Times the loop."""
  data = gpu_sizes.data(job.workload, tiny=job.tiny)
  seen = Losses()
  run = Loop(model(data), tensors(data), seen=seen, rate=LEARNING_RATE)
  if compiled:
    # Inductor takes half a minute for the tiny model, too.
    run.compile("aot_eager" if job.tiny else "inductor")
  clock = budget.Clock(job, wait)
  for _ in range(budget.WARM_UP + job.steps):
    clock.begin()
    run.step()
    clock.end()
  seen.save(job)


def wait() -> None:
  """Returns when the device has nothing left to do."""
  if DEVICE == "cuda":
    torch.cuda.synchronize()
