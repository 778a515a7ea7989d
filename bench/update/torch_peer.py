"""The peer in plain torch: transformers' Llava in a loop, as one writes it.

Both losses as TRL computes them: an example's answers are sequences of their
own, each with its image, and the logits are those of the answers alone. There
is no padding (the toy's answers are equally long), no checkpointing and no
dropout; `bench/update/trl_peer.py` holds the trainers.

Q pairs, S sequences (chosen ones first), P patches, T tokens, A answer tokens.
"""

import copy
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
import torch
import transformers

from bench import harness
from bench.update import toy

LEARNING_RATE = 1e-4
BETA = 0.1
CLIP = 1.0
# The harness of a benchmark on a CPU hides other devices.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# What the gate compares beside losses: our path -> theirs, and how to turn it.
_TENSORS: Mapping[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
  "llm/embed_tokens/embedding": (
    "model.language_model.embed_tokens.weight",
    np.asarray,
  ),
  "llm/norm/scale": ("model.language_model.norm.weight", np.asarray),
  "projector/linear_1/kernel": (
    "model.multi_modal_projector.linear_1.weight",
    np.transpose,
  ),
  "vision/embeddings/patch_embedding/kernel": (
    "model.vision_tower.embeddings.patch_embedding.weight",
    functools.partial(np.transpose, axes=(2, 3, 1, 0)),
  ),
}


def load(data: toy.Toy, attention: str = "sdpa") -> torch.nn.Module:
  """Return the model in float32, on the threads that the harness gives."""
  torch.set_num_threads(harness.CORES)
  model = transformers.LlavaForConditionalGeneration.from_pretrained(
    data.folder, attn_implementation=attention, dtype=torch.float32
  )
  return model.to(DEVICE).train()


@dataclasses.dataclass(frozen=True)
class Tensors:
  """A batch: ids [S, T] and pixels [S, 3, H, W]; answers start at `start`."""

  ids: torch.Tensor
  pixels: torch.Tensor
  start: int

  @property
  def answer_mask(self) -> torch.Tensor:
    """1 on the answers, [S, T]."""
    mask = torch.zeros_like(self.ids)
    mask[:, self.start :] = 1
    return mask


def tensors(data: toy.Toy, names: tuple[str, ...]) -> Tensors:
  """Return the sequences of the named answers, ("chosen", "rejected")."""
  answers = {"chosen": data.chosen, "rejected": data.rejected}
  image = np.full((len(data.prompt), data.patches), toy.IMAGE_ID)
  ids = [np.concatenate([image, data.prompt, answers[n]], 1) for n in names]
  scaled = (data.images / 255.0 - 0.5) / 0.5
  pixels = torch.tensor(scaled.transpose(0, 3, 1, 2), dtype=torch.float32)
  return Tensors(
    ids=torch.tensor(np.concatenate(ids)),
    pixels=torch.cat([pixels] * len(names)),
    start=data.prompt_tokens,
  )


def token_logps(model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
  """Return log p of every answer token, [S, A]."""
  hidden = model.model(
    input_ids=batch.ids, pixel_values=batch.pixels, use_cache=False
  ).last_hidden_state
  logits = model.lm_head(hidden[:, batch.start - 1 : -1]).float()
  targets = batch.ids[:, batch.start :, None]
  return logits.log_softmax(-1).gather(2, targets)[..., 0]


def dpo_loss(
  model: torch.nn.Module, reference: torch.nn.Module, batch: Tensors
) -> torch.Tensor:
  """Return the DPO loss, the reference model running in every step."""
  policy = token_logps(model, batch).sum(1)
  with torch.no_grad():
    fixed = token_logps(reference, batch).sum(1)
  chosen, rejected = (policy - fixed).chunk(2)
  return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def sft_loss(model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
  """Return the mean negative log-probability of the answers' tokens."""
  return -token_logps(model, batch).mean()


def dpo(folder: pathlib.Path, **how) -> harness.Ready:
  """Return the loop for DPO; `how` is passed to `train`."""

  def make_loss(model, batch):
    reference = frozen(model)
    return lambda: dpo_loss(model, reference, batch)

  return train(toy.read(folder), ("chosen", "rejected"), make_loss, **how)


def sft(folder: pathlib.Path, **how) -> harness.Ready:
  """Return the loop for SFT on the chosen answers."""

  def make_loss(model, batch):
    return lambda: sft_loss(model, batch)

  return train(toy.read(folder), ("chosen",), make_loss, **how)


def train(
  data: toy.Toy,
  names: tuple[str, ...],
  make_loss: Callable,
  *,
  attention: str = "sdpa",
  fused: bool = True,
  compiled: bool = False,
  bf16: bool = False,
) -> harness.Ready:
  """Return the training loop of a loss.

  Args:
    fused: AdamW as one kernel; otherwise its "foreach" form.
    compiled: the loss, and with it the backward pass, by torch.compile.
    bf16: the loss under autocast; parameters and optimizer stay float32.
  """
  model, batch = load(data, attention), tensors(data, names)
  loss_fn = make_loss(model, batch)
  if compiled:
    loss_fn = torch.compile(loss_fn)
  seen = Seen(model)
  with torch.no_grad(), autocast(bf16):
    seen.score(token_logps(model, batch))
  step = stepper(
    model, loss_fn, seen.add, rate=LEARNING_RATE, fused=fused, bf16=bf16
  )
  return harness.stepping(step, seen.numbers)


def stepper(
  model: torch.nn.Module,
  loss_fn: Callable[[], torch.Tensor],
  add: Callable[[torch.Tensor, torch.Tensor], None],
  *,
  rate: float,
  fused: bool = True,
  bf16: bool = False,
) -> Callable[[], None]:
  """Return an update; `add` is called with its loss and norm."""
  optimizer = torch.optim.AdamW(
    model.parameters(),
    lr=rate,
    weight_decay=0.0,
    fused=fused,
    foreach=not fused,
  )

  def step():
    optimizer.zero_grad(set_to_none=True)
    with autocast(bf16):
      loss = loss_fn()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    add(loss, norm)

  return step


def autocast(bf16: bool) -> torch.autocast:
  """Return the context in which products are in bfloat16, if so asked."""
  return torch.autocast(DEVICE, torch.bfloat16, enabled=bf16)


def frozen(model: torch.nn.Module) -> torch.nn.Module:
  """Return a copy for the reference model."""
  return copy.deepcopy(model).eval().requires_grad_(False)


class Seen:
  """Keep what the gate compares: scores before training, then every step."""

  def __init__(self, model):
    self._parameters = dict(model.named_parameters())
    self._before = self._now()
    self._scores: list[torch.Tensor] = []
    self._losses: list[torch.Tensor] = []
    self._norms: list[torch.Tensor] = []

  def score(self, logps: torch.Tensor) -> None:
    """Take the log-probabilities of the untrained model, [S, ...]."""
    self._scores.append(logps.detach().float().sum(1))

  def add(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
    """Add a step: two small tensors, read when they are asked for."""
    self._losses.append(loss.detach())
    self._norms.append(norm.detach())

  def numbers(self) -> dict[str, np.ndarray]:
    """Return them under our names and in our shapes."""
    count, now = harness.GATE_STEPS, self._now()
    return {
      "logps": torch.stack(self._scores)[0].cpu().numpy(),
      "loss": torch.stack(self._losses[:count]).float().cpu().numpy(),
      "grad_norm": torch.stack(self._norms[:count]).float().cpu().numpy(),
    } | {f"update/{path}": now[path] - self._before[path] for path in now}

  def _now(self) -> dict[str, np.ndarray]:
    return {
      path: turn(self._parameters[name].detach().cpu().numpy()).copy()
      for path, (name, turn) in _TENSORS.items()
    }


MAKERS = {"dpo": dpo, "sft": sft}
