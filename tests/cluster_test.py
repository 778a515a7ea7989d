"""The place of a process among others, from variables that launchers set."""

import pytest

from pivot_jax import cluster
from pivot_jax.errors import InputError

TRIPLE = {
  "JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476",
  "JAX_NUM_PROCESSES": "4",
  "JAX_PROCESS_ID": "3",
}
STEP = {
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "0",
  "SLURM_STEP_NODELIST": "node[1-2]",
  "SLURM_STEP_NUM_NODES": "2",
  "SLURM_JOB_ID": "17",
}


def alone(_):
  return 1


def find(environment, spec="auto", workers=alone):
  return cluster.find(spec, environment, workers=workers)


def test_nothing_set_is_one_process_and_no_metadata_is_asked_elsewhere():
  assert cluster.find("auto", {}) is None


def test_the_three_variables_of_jax_give_address_count_and_index():
  found = find(TRIPLE)
  assert (found.address, found.count, found.index) == ("10.0.0.2:8476", 4, 3)


def test_a_pod_of_an_indexed_job_has_its_index_from_the_job():
  job = {**TRIPLE, "JOB_COMPLETION_INDEX": "2"}
  del job["JAX_PROCESS_ID"]
  assert find(job).index == 2


@pytest.mark.parametrize("absent", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_an_address_without_the_rest_says_what_is_missing(absent):
  given = {k: v for k, v in TRIPLE.items() if k != absent}
  with pytest.raises(InputError, match=absent):
    find(given)


def test_an_address_alone_leaves_the_rest_to_what_jax_finds():
  found = find({"JAX_COORDINATOR_ADDRESS": "a:1"} | STEP)
  assert (found.address, found.count, found.index) == ("a:1", None, None)


def test_a_count_of_one_is_one_process():
  assert (
    find(TRIPLE | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
  )


@pytest.mark.parametrize(
  "given",
  [
    TRIPLE | {"JAX_PROCESS_ID": "4"},
    TRIPLE | {"JAX_PROCESS_ID": "three"},
    TRIPLE | {"JAX_NUM_PROCESSES": "-4"},
  ],
)
def test_a_count_or_index_that_cannot_be_is_an_error(given):
  with pytest.raises(InputError, match="JAX_"):
    find(given)


def test_the_flag_gives_all_three_whatever_is_set():
  found = find(TRIPLE, "127.0.0.1:99,2,1")
  assert (found.address, found.count, found.index) == ("127.0.0.1:99", 2, 1)
  assert find(TRIPLE, "none") is None
  assert find(TRIPLE, "127.0.0.1:99,1,0") is None


@pytest.mark.parametrize("spec", ["two", "a:1,2", "a:1,2,2", "a,2,0", ""])
def test_another_word_of_the_flag_is_an_error(spec):
  with pytest.raises(InputError, match="processes"):
    find({}, spec)


def test_a_slice_of_several_workers_is_joined_and_of_one_is_not():
  assert find({"TPU_WORKER_HOSTNAMES": "a,b"}).address is None
  assert find({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
  assert find({}, workers=lambda _: 4).sign == "4 workers of a TPU slice"


def test_the_metadata_of_one_worker_with_its_name_is_not_asked():
  def asked(_):
    raise AssertionError("asked")

  assert find({"TPU_WORKER_HOSTNAMES": "a"}, workers=asked) is None


def test_several_slices_are_joined_with_one_worker_each():
  given = {"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "a"}
  assert find(given) is not None


def test_a_slurm_step_is_joined_and_a_batch_script_is_not():
  assert find(STEP).count is None
  batch = {k: v for k, v in STEP.items() if k != "SLURM_STEP_NODELIST"}
  assert find(batch) is None
  assert find(STEP | {"SLURM_NTASKS": "1"}) is None


def test_a_task_alone_on_its_node_takes_all_gpus():
  found = find(STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
  assert found.local_devices == (0, 1, 2, 3)


def test_a_task_for_each_gpu_leaves_the_numbers_to_jax():
  given = STEP | {"SLURM_NTASKS": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
  assert find(given).local_devices is None


def test_a_task_that_sees_one_gpu_takes_it_whatever_its_number():
  given = STEP | {"SLURM_NTASKS": "8", "SLURM_LOCALID": "3"}
  found = find(given | {"CUDA_VISIBLE_DEVICES": "3"})
  assert found.local_devices == (0,)


def test_ranks_of_mpi_are_joined():
  given = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
  found = find(given | {"CUDA_VISIBLE_DEVICES": "0,1"})
  assert found.local_devices == (0, 1)
  assert find({"OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_what_was_given_has_to_be_what_was_joined():
  cluster.check(TRIPLE, count=4, index=3)
  with pytest.raises(InputError, match="JAX_NUM_PROCESSES=4"):
    cluster.check(TRIPLE, count=2, index=1)
  with pytest.raises(InputError, match="SLURM_NTASKS=2"):
    cluster.check(STEP, count=3, index=1)


def slice_of(number, count="2"):
  return {"MEGASCALE_NUM_SLICES": count, "MEGASCALE_SLICE_ID": number}


def test_slices_that_the_processes_make_up_pass():
  cluster.check_slices([{}, {}])
  cluster.check_slices([slice_of("0"), slice_of("1")])


@pytest.mark.parametrize(
  "everyone",
  [
    [slice_of("0"), slice_of("0")],
    [slice_of("0"), slice_of("1"), slice_of("1")],
    [{"MEGASCALE_NUM_SLICES": "2"}] * 2,
    [slice_of("0", "3"), slice_of("1", "3")],
  ],
)
def test_variables_of_slices_that_another_job_left_are_refused(everyone):
  with pytest.raises(InputError, match="MEGASCALE_"):
    cluster.check_slices(everyone)


def test_another_number_of_devices_than_the_launcher_expects_is_refused():
  cluster.check_devices({}, 7)
  cluster.check_devices({"PIVOT_DEVICES": "8"}, 8)
  with pytest.raises(InputError, match="PIVOT_DEVICES=8"):
    cluster.check_devices({"PIVOT_DEVICES": "8"}, 7)


@pytest.mark.parametrize(
  ("device", "extra"), [("gpus", "cuda12"), ("tpus", "tpu")]
)
def test_an_accelerator_that_is_not_used_says_what_to_install(
  monkeypatch, device, extra
):
  monkeypatch.setattr(cluster, "gpus", list)
  monkeypatch.setattr(cluster, "tpus", list)
  cluster.check_platform("cpu", "", {})
  monkeypatch.setattr(cluster, device, lambda: ["/dev/it"])
  with pytest.raises(InputError, match=rf"/dev/it.*\[{extra}\].*platform=cpu"):
    cluster.check_platform("cpu", "", {})
  cluster.check_platform("cpu", "cpu", {})
  cluster.check_platform("cpu", "", {"JAX_PLATFORMS": "cpu"})
  cluster.check_platform("gpu", "", {})


def test_gpus_that_the_user_hid_are_not_missed(monkeypatch):
  monkeypatch.setattr(cluster, "gpus", lambda: ["/dev/nvidia0"])
  monkeypatch.setattr(cluster, "tpus", list)
  cluster.check_platform("cpu", "", {"CUDA_VISIBLE_DEVICES": ""})
