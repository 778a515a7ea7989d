"""The place of a process among others, as the launcher's variables give it.

It opens no port and touches no device; `processes.start` joins. The signs, in
the order in which they count, are those of `find`.
"""

import dataclasses
import os
import pathlib
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from pivot_jax.errors import InputError

# What every process was given alike, compared before a device is touched: a
# stale one makes others wait for ever.
SHARED = (
  *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "PIVOT_DEVICES"),
  *("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES"),
  *("TPU_ACCELERATOR_TYPE", "TPU_TOPOLOGY", "SLURM_JOB_ID", "SLURM_NTASKS"),
  *("OMPI_COMM_WORLD_SIZE", "JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS"),
  *("NCCL_PROTO", "PIVOT_GRACE", "PIVOT_JOIN", "PIVOT_HEARTBEAT"),
)
# What each was given for itself.
OWN = (
  *("JAX_PROCESS_ID", "MEGASCALE_SLICE_ID", "TPU_WORKER_ID", "SLURM_PROCID"),
  *("SLURM_LOCALID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX"),
  *("CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS"),
)
_SPEC = re.compile(r"(?P<address>.+:\d+),(?P<count>\d+),(?P<index>\d+)")
_METADATA = (
  "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
  "worker-network-endpoints"
)
_TRIPLE = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
Environment = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Joining:
  """The place of a process; jax finds what is None.

  `sign` names the variable that told it, for messages.
  """

  sign: str
  address: str | None = None
  count: int | None = None
  index: int | None = None
  local_devices: tuple[int, ...] | None = None


def find(
  spec: str,
  environment: Environment,
  *,
  workers: Callable[[Environment], int] | None = None,
) -> Joining | None:
  """Return how this process joins others, None for a run of one process.

  Args:
    spec: "auto", "none" or ADDRESS:PORT,COUNT,INDEX.
    environment: the variables.
    workers: gives the workers of the TPU slice that this machine is of.

  Raises:
    InputError: half of what is needed, or what contradicts itself.
  """
  if spec == "none":
    return None
  if spec != "auto":
    return _told(spec)
  found = (
    _from_triple(environment)
    or _from_tpu(environment, workers or _workers)
    or _from_slurm(environment)
    or _from_mpi(environment)
  )
  if environment.get("JAX_COORDINATOR_ADDRESS") and found is None:
    if environment.get("JAX_NUM_PROCESSES") == "1":
      return None
    raise InputError(_half(environment))
  return found


def _told(spec: str) -> Joining | None:
  """Return what --processes says."""
  found = _SPEC.fullmatch(spec)
  if not found:
    raise InputError(
      f"--processes={spec}: give auto, none or ADDRESS:PORT,COUNT,INDEX, as "
      "10.0.0.2:8476,4,0"
    )
  count, index = int(found["count"]), int(found["index"])
  _check_index(f"--processes={spec}", count, index)
  if count == 1:
    return None
  return Joining("--processes", found["address"], count, index)


def _check_index(where: str, count: int, index: int) -> None:
  if count < 1 or not 0 <= index < count:
    raise InputError(
      f"{where}: of {count} processes the index is 0 to {count - 1}, not {index}"
    )


def _number(environment: Environment, name: str) -> int | None:
  """Return the number in a variable, None where it is not set."""
  text = environment.get(name, "")
  if not text:
    return None
  if not re.fullmatch(r"\d+", text):
    raise InputError(f"{name}={text!r}: is no number; give one, or unset it")
  return int(text)


def seconds(environment: Environment, name: str, default: int) -> int:
  """Return the seconds in a variable; raise InputError if it holds none."""
  found = _number(environment, name)
  return default if found is None else found


def _from_triple(environment: Environment) -> Joining | None:
  """Return what the variables of jax's names say; of a Job the index."""
  address = environment.get("JAX_COORDINATOR_ADDRESS")
  count = _number(environment, "JAX_NUM_PROCESSES")
  index = _number(environment, "JAX_PROCESS_ID")
  if index is None:
    index = _number(environment, "JOB_COMPLETION_INDEX")
  if not address or count is None or index is None or count == 1:
    return None
  _check_index("JAX_NUM_PROCESSES and JAX_PROCESS_ID", count, index)
  return Joining(
    "JAX_COORDINATOR_ADDRESS",
    address,
    count,
    index,
    _listed_devices(environment),
  )


def _listed_devices(environment: Environment) -> tuple[int, ...] | None:
  """Return JAX_LOCAL_DEVICE_IDS, which jax reads where others are not given."""
  text = environment.get("JAX_LOCAL_DEVICE_IDS", "")
  if not text:
    return None
  if not re.fullmatch(r"\d+(,\d+)*", text):
    raise InputError(f"JAX_LOCAL_DEVICE_IDS={text!r}: give numbers, as 0,1")
  return tuple(map(int, text.split(",")))


def _half(environment: Environment) -> str:
  """Return what to do of an address alone."""
  absent = [name for name in _TRIPLE if not environment.get(name)]
  return (
    f"JAX_COORDINATOR_ADDRESS={environment['JAX_COORDINATOR_ADDRESS']} asks for"
    f" several processes, but {' and '.join(absent)} is missing and no TPU pod,"
    " SLURM step or MPI was found: set it, or --processes=none for one process"
  )


def _from_tpu(
  environment: Environment, workers: Callable[[Environment], int]
) -> Joining | None:
  """Return that jax finds the others of a TPU slice, or of several."""
  names = [
    x for x in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if x
  ]
  slices = _number(environment, "MEGASCALE_NUM_SLICES") or 1
  address = environment.get("JAX_COORDINATOR_ADDRESS")
  if slices > 1:
    return Joining(f"MEGASCALE_NUM_SLICES={slices}", address)
  if len(names) > 1:
    return Joining(f"TPU_WORKER_HOSTNAMES of {len(names)}", address)
  if names:
    return None
  found = workers(environment)
  return (
    Joining(f"{found} workers of a TPU slice", address) if found > 1 else None
  )


def _workers(environment: Environment) -> int:
  """Return how many workers the slice of a TPU VM has, 1 elsewhere.

  The metadata service is asked once, and only on a machine that has TPUs and is
  of that cloud.
  """
  product = pathlib.Path("/sys/class/dmi/id/product_name")
  skip = "TPU_SKIP_MDS_QUERY" in environment
  try:
    cloud = "Google" in product.read_text("utf-8")
  except OSError:
    cloud = False
  if skip or not cloud or not tpus():
    return 1
  asked = urllib.request.Request(
    _METADATA, headers={"Metadata-Flavor": "Google"}
  )
  try:
    with urllib.request.urlopen(asked, timeout=5) as answer:
      text = answer.read(2**20).decode("utf-8", "replace")
  except (urllib.error.URLError, OSError):
    return 1
  return len([one for one in text.split(",") if one.strip()])


def _from_slurm(environment: Environment) -> Joining | None:
  """Return that jax finds the other tasks of a SLURM step.

  A task that is alone on its node takes all GPUs, where jax would give it the
  one of its number; one that sees a single GPU takes that.
  """
  tasks = _number(environment, "SLURM_NTASKS") or 1
  inside = {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environment.keys()
  if tasks <= 1 or not inside:
    return None
  nodes = _number(environment, "SLURM_STEP_NUM_NODES") or 1
  return Joining(
    f"SLURM_NTASKS={tasks}",
    environment.get("JAX_COORDINATOR_ADDRESS"),
    local_devices=_gpus_of_task(environment, alone=tasks == nodes),
  )


def _from_mpi(environment: Environment) -> Joining | None:
  """Return that jax finds the other ranks of Open MPI; GPUs as under SLURM."""
  ranks = _number(environment, "OMPI_COMM_WORLD_SIZE") or 1
  if ranks <= 1:
    return None
  local = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1
  return Joining(
    f"OMPI_COMM_WORLD_SIZE={ranks}",
    environment.get("JAX_COORDINATOR_ADDRESS"),
    local_devices=_gpus_of_task(environment, alone=local == 1),
  )


def _gpus_of_task(
  environment: Environment, *, alone: bool
) -> tuple[int, ...] | None:
  """Return the GPUs that a task takes, None where jax's rule is right."""
  listed = _listed_devices(environment)
  if listed:
    return listed
  seen = environment.get("CUDA_VISIBLE_DEVICES")
  count = len([x for x in seen.split(",") if x]) if seen else len(gpus())
  if not count:
    return None
  return tuple(range(count)) if alone or count == 1 else None


def gpus() -> list[str]:
  """Return the device files of NVIDIA's GPUs on this machine."""
  found = pathlib.Path("/dev").glob("nvidia*")
  return sorted(str(x) for x in found if re.fullmatch(r"nvidia\d+", x.name))


def tpus() -> list[str]:
  """Return the device files of TPUs on this machine."""
  found = [*pathlib.Path("/dev").glob("accel[0-9]*")]
  vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
  # Newer TPUs are PCI devices of Google's behind vfio.
  if any(_read(one) == "0x1ae0" for one in vendors):
    found += pathlib.Path("/dev/vfio").glob("[0-9]*")
  return sorted(map(str, found))


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text("ascii").strip()
  except (OSError, ValueError):
    return ""


def given(environment: Environment, names: tuple[str, ...]) -> dict[str, str]:
  """Return the variables of these names that are set."""
  return {name: environment[name] for name in names if environment.get(name)}


def check(environment: Environment, *, count: int, index: int) -> None:
  """Raise InputError where what was given is not what was joined."""
  said = {
    "JAX_NUM_PROCESSES": count,
    "SLURM_NTASKS": count if "SLURM_STEP_NODELIST" in environment else None,
    "OMPI_COMM_WORLD_SIZE": count,
    "JAX_PROCESS_ID": index,
  }
  for name, real in said.items():
    told = _number(environment, name)
    if told is not None and real is not None and told != real:
      raise InputError(
        f"{name}={told}, but this is process {index} of {count}: unset it, or "
        "give what the launcher means"
      )


def check_slices(own: list[dict[str, str]]) -> None:
  """Raise InputError for slices that the processes' variables do not make up.

  `own` has the variables of each process. A variable that an earlier job left
  makes libtpu wait for a slice that is not there.
  """
  slices = {int(x.get("MEGASCALE_NUM_SLICES", 1) or 1) for x in own}
  count = max(slices)
  ids = sorted(x.get("MEGASCALE_SLICE_ID", "") for x in own)
  if count == 1:
    return
  found = {one: ids.count(one) for one in dict.fromkeys(ids)}
  whole = set(found) == {str(i) for i in range(count)}
  if not whole or len(set(found.values())) != 1:
    listed = ", ".join(f"{k or 'none'}: {v}" for k, v in found.items())
    raise InputError(
      f"MEGASCALE_NUM_SLICES={count}, but the processes are of these slices "
      f"(MEGASCALE_SLICE_ID: processes): {listed}; unset MEGASCALE_* if they "
      "were left by another job, or start all slices"
    )


def check_devices(environment: Environment, devices: int) -> None:
  """Raise InputError if the launcher expects another number of devices."""
  wanted = _number(environment, "PIVOT_DEVICES")
  if wanted is not None and wanted != devices:
    raise InputError(
      f"PIVOT_DEVICES={wanted} devices are expected and jax has {devices}: look "
      "for hosts that did not join, or for devices that are hidden "
      "(CUDA_VISIBLE_DEVICES, --gpus-per-task)"
    )


def check_platform(backend: str, wanted: str, environment: Environment) -> None:
  """Raise InputError if an accelerator is there that jax does not use.

  Args:
    backend: what jax computes on: "cpu", "gpu", "tpu".
    wanted: of the config; "cpu" accepts it, as does JAX_PLATFORMS.
    environment: the variables.
  """
  if backend != "cpu" or wanted or environment.get("JAX_PLATFORMS"):
    return
  hidden = environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
  for name, found, install in (
    ("GPU", [] if hidden else gpus(), "'pivot_jax[cuda12]' (or [cuda13])"),
    ("TPU", tpus(), "'pivot_jax[tpu]'"),
  ):
    if found:
      raise InputError(
        f"there is a {name} ({found[0]}) and jax does not use it: pip install "
        f"{install}, or accept the CPU with --config.platform=cpu"
      )


def environment() -> dict[str, str]:
  """Return the variables of this process."""
  return dict(os.environ)
