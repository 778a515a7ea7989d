"""launch/jobset.yaml: how a JobSet of TPU hosts, or of GPU nodes, behaves."""

import subprocess

import pytest
import yaml

from tests.launch import scripts

PATH = scripts.LAUNCH / "jobset.yaml"
# The command in its head that makes it one of GPU nodes.
TO_GPU = ("-e", "/# TPU$/d", "-e", "s/#GPU //")


def read(kind):
  text = PATH.read_text("utf-8")
  if kind == "gpu":
    assert "sed -e '/# TPU$/d' -e 's/#GPU //' launch/jobset.yaml" in text
    command = ["sed", *TO_GPU, str(PATH)]
    text = subprocess.run(
      command, capture_output=True, text=True, check=True
    ).stdout
  return yaml.safe_load(text)


@pytest.fixture(params=["tpu", "gpu"])
def jobset(request):
  """Return the JobSet of a kind."""
  return read(request.param)


def job(jobset):
  (group,) = jobset["spec"]["replicatedJobs"]
  return group["template"]["spec"]


def pod(jobset):
  return job(jobset)["template"]["spec"]


def container(jobset):
  (found,) = pod(jobset)["containers"]
  return found


def env(jobset):
  return {one["name"]: one["value"] for one in container(jobset)["env"]}


def test_it_is_a_jobset(jobset):
  assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert jobset["kind"] == "JobSet"


def test_a_lost_pod_makes_all_anew_ten_times(jobset):
  policy = jobset["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 10
  assert job(jobset)["backoffLimit"] == 0
  assert pod(jobset)["restartPolicy"] == "Never"


def test_exit_codes_of_mistakes_end_it(jobset):
  (rule,) = job(jobset)["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob"
  codes = rule["onExitCodes"]
  assert codes["operator"] == "In" and codes["values"] == [1, 2]
  assert codes["containerName"] == container(jobset)["name"]
  (rule,) = jobset["spec"]["failurePolicy"]["rules"]
  assert rule["action"] == "FailJobSet"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_hosts_are_numbered_and_counted(jobset):
  spec = job(jobset)
  assert spec["completionMode"] == "Indexed"
  assert spec["parallelism"] == spec["completions"]
  limits = container(jobset)["resources"]["limits"]
  (devices,) = limits.values()
  assert int(env(jobset)["PIVOT_DEVICES"]) == spec["completions"] * devices


def test_it_is_told_how_long_it_has_to_save(jobset):
  seconds = pod(jobset)["terminationGracePeriodSeconds"]
  assert seconds == 120 == int(env(jobset)["PIVOT_GRACE"])


def test_it_runs_the_loop_in_a_shared_folder(jobset):
  found = container(jobset)
  assert found["command"] == ["bash", "launch/run.sh"]
  assert found["args"][0].startswith("--config=")
  (workdir,) = [one for one in found["args"] if one.startswith("--workdir=")]
  (claim,) = [v for v in pod(jobset)["volumes"] if "emptyDir" not in v]
  assert claim["persistentVolumeClaim"]["claimName"]
  mounts = {one["name"]: one["mountPath"] for one in found["volumeMounts"]}
  assert workdir.startswith(f"--workdir={mounts[claim['name']]}/")
  assert {one["name"] for one in pod(jobset)["volumes"]} == set(mounts)


def test_memory_is_requested(jobset):
  assert container(jobset)["resources"]["requests"]["memory"].endswith("Gi")


def test_a_slice_has_a_topology_and_the_program_asks_it():
  jobset = read("tpu")
  nodes = pod(jobset)["nodeSelector"]
  assert nodes["cloud.google.com/gke-tpu-accelerator"] == "tpu-v6e-slice"
  sides = nodes["cloud.google.com/gke-tpu-topology"].split("x")
  chips = int(sides[0]) * int(sides[1])
  assert chips == int(env(jobset)["PIVOT_DEVICES"])
  limits = container(jobset)["resources"]["limits"]
  assert chips == job(jobset)["completions"] * limits["google.com/tpu"]
  assert not any(name.startswith("JAX_") for name in env(jobset))
  assert "JAX_" not in str(jobset)


def test_gpu_nodes_find_the_first_by_its_name():
  jobset = read("gpu")
  assert "tpu" not in str(jobset).lower()
  spec, found = jobset["spec"], env(jobset)
  assert spec["network"]["enableDNSHostnames"]
  assert spec["network"]["publishNotReadyAddresses"]
  group = f"{jobset['metadata']['name']}-{spec['replicatedJobs'][0]['name']}"
  first = f"{group}-0-0.{spec['network']['subdomain']}:8476"
  assert found["JAX_COORDINATOR_ADDRESS"] == first
  assert int(found["JAX_NUM_PROCESSES"]) == job(jobset)["completions"]
  # It is the number of a pod, which Kubernetes sets.
  assert "JAX_PROCESS_ID" not in found and "JOB_COMPLETION_INDEX" not in found
  limit = "--xla_gpu_nccl_termination_timeout_seconds=600"
  assert found["XLA_FLAGS"] == limit
  assert found["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"
