"""The peer in plain torch on a GPU: transformers' Llava in a loop.

float32 weights and AdamW under bfloat16 autocast, weights made on the device.
The tower has the 26 blocks that are read, none behind them. The loop computes
as TRL does (`bench/gpu/trl_peer.py`): every answer is a sequence with its
image, the reference model runs in every step. What is known to be fast is on:
logits of the answers alone, no mask where the padding is behind (a causal
kernel without one), fused AdamW.

S sequences (chosen ones first), T tokens, M answer tokens, E width.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
import transformers
from transformers import modeling_layers

from bench import harness
from bench.gpu import sizes
from bench.update import torch_peer, toy

LEARNING_RATE = 1e-6
# Positions that have logits at a time.
CHUNK = 2048
TINY_TOY = {"pairs": 2, "answer": 8, "image": 64, "layers": 2}
DEVICE = torch_peer.DEVICE


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
    """The inputs that TRL's collators make for either trainer."""
    return {
      "input_ids": self.ids,
      "attention_mask": self.mask,
      "pixel_values": self.pixels,
    }


def tensors(data: sizes.Data) -> Tensors:
  """Return the batch on the device, padded behind as TRL pads."""
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


def model(data: sizes.Data) -> torch.nn.Module:
  """Return a model of random float32 weights, made on the device."""
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
    attn_implementation="sdpa",
  )
  with torch.device(DEVICE):
    return transformers.LlavaForConditionalGeneration(config).train()


def token_logps(model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
  """Return log p of the answers' tokens, [M]."""
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


def answer_logps(model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
  """Return the log-probability of every answer, [S]."""
  values = token_logps(model, batch)
  sums = torch.zeros(len(batch.ids), device=values.device)
  return sums.index_add(0, batch.sequence, values)


def dpo_loss(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
  """Return the DPO loss of both models' log-probabilities [S]."""
  chosen, rejected = (policy - reference).chunk(2)
  scaled = torch_peer.BETA * (chosen - rejected)
  return -torch.nn.functional.logsigmoid(scaled).mean()


class Losses:
  """Loss and gradient norm of every step, on the device until asked for."""

  def __init__(self):
    self._losses, self._norms = [], []

  def add(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
    """Add a step."""
    self._losses.append(loss.detach())
    self._norms.append(norm.detach())

  def facts(self) -> dict[str, Any]:
    """Return losses, gradient norms and memory of the steps."""
    losses = [float(x) for x in self._losses]
    norms = [float(x) for x in self._norms]
    finite = bool(np.isfinite(losses + norms).all())
    found = {"losses": losses, "grad_norms": norms, "finite": finite}
    found["notes"] = ["NOT FINITE"] * (not finite)
    if DEVICE == "cuda":
      found["peak"] = torch.cuda.max_memory_allocated()
      reserved = torch.cuda.max_memory_reserved() / 1e9
      found["notes"] += [f"reserved {reserved:.1f} GB"]
    return found


def loss_of(
  policy: torch.nn.Module, reference: torch.nn.Module | None, batch: Tensors
) -> Callable[[], torch.Tensor]:
  """Return the loss of a batch, of SFT where there is no reference model."""

  def sft():
    return -token_logps(policy, batch).mean()

  def dpo():
    ours = answer_logps(policy, batch)
    with torch.no_grad():
      fixed = answer_logps(reference, batch)
    return dpo_loss(ours, fixed)

  return sft if reference is None else dpo


def _compile_blocks(model, backend: str) -> None:
  """Have every block compiled on its first call, all with one program.

  As a whole the two models take torch minutes.
  """
  for module in model.modules():
    if isinstance(module, modeling_layers.GradientCheckpointingLayer):
      module.compile(backend=backend)


def update(
  folder: pathlib.Path, workload: str, *, compiled: bool = False
) -> harness.Ready:
  """Return the loop on a model of real size."""
  tiny = bool(harness.options(folder)["tiny"])
  data = sizes.data(workload, tiny=tiny)
  policy, batch, seen = model(data), tensors(data), Losses()
  reference = torch_peer.frozen(policy) if batch.pairs else None
  if compiled:
    for owner in filter(None, (policy, reference)):
      # Inductor takes half a minute for the tiny model, too.
      _compile_blocks(owner, "aot_eager" if tiny else "inductor")
  step = torch_peer.stepper(
    policy,
    loss_of(policy, reference, batch),
    seen.add,
    rate=LEARNING_RATE,
    bf16=True,
  )
  return harness.stepping(waiting(step), facts=seen.facts)


def toy_update(folder: pathlib.Path, dtype: str) -> harness.Ready:
  """Return the loop on the toy, whose numbers the gate compares.

  The first one writes the toy: our rows can do without torch.
  """
  # Convolutions would round their inputs otherwise.
  torch.backends.cudnn.allow_tf32 = False
  if not (folder / "sizes.json").exists():
    tiny = bool(harness.options(folder)["tiny"])
    toy.write(folder, TINY_TOY if tiny else toy.OPTIONS, answers=2)
  data, bf16 = toy.read(folder), dtype == "bfloat16"
  policy, batch = torch_peer.load(data), tensors(_as_data(data))
  seen = torch_peer.Seen(policy)
  step = torch_peer.stepper(
    policy,
    loss_of(policy, torch_peer.frozen(policy), batch),
    seen.add,
    rate=torch_peer.LEARNING_RATE,
    bf16=bf16,
  )
  with torch.no_grad(), torch_peer.autocast(bf16):
    seen.score(answer_logps(policy, batch)[:, None])
  return harness.stepping(waiting(step), seen.numbers)


def _as_data(data: toy.Toy) -> sizes.Data:
  return sizes.Data(
    vision={"image_size": data.sizes["image"], "patch_size": toy.PATCH},
    llm={"vocab_size": toy.VOCAB},
    prompt=list(data.prompt),
    chosen=list(data.chosen),
    rejected=list(data.rejected),
    images=data.images,
  )


def waiting(step: Callable[[], None]) -> Callable[[], None]:
  """Return a step that ends when the device has nothing left to do."""

  def done():
    step()
    wait()

  return done


def wait() -> None:
  """Return when the device has nothing left to do."""
  if DEVICE == "cuda":
    torch.cuda.synchronize()


MAKERS = {"update": update, "toy": toy_update}
