"""Two processes agree, decide, gather, wait, fail and are watched."""

import json
import socket

import pytest

from tests.processes import together

TALK = """
import json, sys, time, pathlib
import numpy as np
from pivot_jax import processes
from pivot_jax.errors import InputError
index, count = processes.start()
def differ(values):
  try:
    processes.agree("config", values)
  except InputError as error:
    return str(error)
order = []
def make():
  order.append(processes.index())
  return index
found = dict(
  place=[index, count, processes.first()],
  same=differ({"lr": "1"}),
  other=differ({"lr": str(index), "same": "1"}),
  absent=differ({"lr": "1"} if index else {}),
  decided=processes.decide("a", lambda: [index, "x"]),
  again=processes.decide("a", lambda: index + 7),
  exchanged=processes.exchange("here", {"i": index}),
  gathered=[x.tolist() for x in processes.gather(np.arange(3 + index) + 0.1)],
  empty=[x.shape for x in processes.gather(np.zeros((index, 2), np.uint16))],
  wide=[x.tolist() for x in processes.gather(np.array([2**40 + index]))],
  turn=processes.in_turn("b", make),
  stop=processes.stop_at(),
)
processes.barrier("c", 20)
processes.finish()
print(json.dumps(found))
"""

FAIL = """
import sys, time
from pivot_jax import processes
index, _ = processes.start()
who = int(sys.argv[1])
if index == who:
  if sys.argv[2] == "raise":
    raise KeyError("lost")
  processes.fail("error: rows.jsonl:3: no image", 2)
time.sleep(100)
"""

STUCK = """
import pathlib, sys, time
import numpy as np
from pivot_jax import processes
index, _ = processes.start()
processes.watch(2, pathlib.Path(sys.argv[1]))
if index == 1:
  processes.beat("reading rows for update", 5)
  time.sleep(100)
processes.beat("update", 5)
processes.gather(np.zeros(3))
"""

MISSING = """
import time
from pivot_jax import processes
index, _ = processes.start()
if index == 1:
  time.sleep(100)
try:
  processes.barrier("the report", 2)
except processes.LostPeerError as error:
  processes.fail(f"error: {error}", processes.EXIT_LOST)
"""


@pytest.fixture(scope="module")
def talk():
  """Return what two processes found when they talked."""
  ended = together.run(["-c", TALK])
  assert [one.code for one in ended] == [0, 0], ended
  return [json.loads(one.out.splitlines()[-1]) for one in ended]


def test_each_process_knows_its_place(talk):
  assert [one["place"] for one in talk] == [[0, 2, True], [1, 2, False]]


def test_equal_values_pass_and_others_name_key_value_and_process(talk):
  for one in talk:
    assert one["same"] is None
    assert "lr is 0 in process 0, 1 in process 1" in one["other"]
    assert "same" not in one["other"]
    assert "lr is nothing in process 0, 1 in process 1" in one["absent"]


def test_the_first_process_decides_each_time_anew(talk):
  for one in talk:
    assert one["decided"] == [0, "x"]
    assert one["again"] == 7


def test_values_and_arrays_of_all_come_by_process_without_loss(talk):
  for one in talk:
    assert one["exchanged"] == [{"i": 0}, {"i": 1}]
    assert one["gathered"] == [[0.1, 1.1, 2.1], [0.1, 1.1, 2.1, 3.1]]
    assert one["empty"] == [[0, 2], [1, 2]]
    assert one["wide"] == [[2**40], [2**40 + 1]]


def test_in_turn_each_makes_its_own(talk):
  assert [one["turn"] for one in talk] == [0, 1]
  assert not any(one["stop"] for one in talk)


@pytest.mark.parametrize("who", [0, 1])
def test_one_fails_and_all_fail_with_its_line_and_code(who):
  ended = together.run(["-c", FAIL, str(who), "input"])
  assert [one.code for one in ended] == [2, 2]
  for one in ended:
    assert "error: rows.jsonl:3: no image" in one.last()
  assert f"process {who} (" in ended[1 - who].last()
  assert ended[1].seconds < 30


def test_an_error_that_nobody_expected_ends_all():
  ended = together.run(["-c", FAIL, "1", "raise"])
  assert [one.code for one in ended] == [1, 1]
  assert "Traceback" in ended[1].err
  assert "KeyError" in ended[0].last()


def test_a_process_that_does_not_move_is_named_and_all_end(tmp_path):
  ended = together.run(["-c", STUCK, str(tmp_path / "stuck")])
  assert [one.code for one in ended] == [70, 70]
  for one in ended:
    assert "process 1 (" in one.last()
    assert "reading rows for update 5" in one.last()
    assert "the others wait in update 5" in one.last()
  for index in (0, 1):
    assert "Thread" in (tmp_path / "stuck" / f"{index}.txt").read_text()


def test_a_barrier_names_who_is_missing():
  ended = together.run(["-c", MISSING])
  assert [one.code for one in ended] == [70, 70]
  assert "process 1 did not come to the report" in ended[0].last()


def test_variables_that_differ_are_refused_in_all():
  each = [{"LIBTPU_INIT_ARGS": "--a"}, {"LIBTPU_INIT_ARGS": "--b"}]
  start = "from pivot_jax import processes; processes.start()"
  ended = together.run(["-c", start], each=each)
  assert [one.code for one in ended] == [1, 1]
  for one in ended:
    assert "LIBTPU_INIT_ARGS" in one.last()


PERMUTED = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh
from pivot_jax import sharding
# As on a slice: the rows of a process do not lie side by side.
order = np.array(jax.devices())[[0, 2, 1, 3]].reshape(4, 1, 1)
mesh = Mesh(order, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
index = jax.process_index()
own = 100 * index + np.arange(8)
placed = sharding.place_rows({"x": own}, mesh)["x"]
doubled = jax.jit(lambda x: 2 * x)(placed)
gathered = sharding.whole(doubled).tolist()
print(json.dumps([
  sharding.own_share(mesh), sharding.own_rows(doubled, mesh).tolist(), gathered,
]))
"""


def test_rows_of_a_process_come_back_on_any_order_of_devices():
  ended = together.script(PERMUTED, 2, devices=2)
  for index, out in enumerate(together.outputs(ended)):
    share, own, whole = json.loads(out)
    assert share == [index, 2]
    assert own == [2 * (100 * index + place) for place in range(8)]
    assert whole[4:8] == [200, 202, 204, 206]


WIDE = """
import json
import jax.numpy as jnp, numpy as np
from pivot_jax import processes
own = np.asarray(jnp.arange(3, dtype=jnp.bfloat16) + processes.index())
found = processes.gather(own)
print(json.dumps([[str(x.dtype), x.astype(float).tolist()] for x in found]))
"""


def test_arrays_of_bfloat16_come_as_they_are():
  for out in together.outputs(together.script(WIDE, 2)):
    assert json.loads(out) == [
      ["bfloat16", [0.0, 1.0, 2.0]],
      ["bfloat16", [1.0, 2.0, 3.0]],
    ]


def refused(words, **how):
  """Return the last lines of processes that cannot join, each ended by 2."""
  code = (
    "import sys\nfrom pivot_jax import command_line, processes\n"
    "from pivot_jax.errors import InputError\n"
    "try:\n  processes.start(sys.argv[1])\n"
    "except InputError as error:\n"
    "  command_line.leave(str(error), 2) if processes.count() == 1 else"
    " processes.fail(str(error), 2)\n"
  )
  ended = together.run([["-c", code, one] for one in words], **how)
  assert [one.code for one in ended] == [2] * len(ended), ended
  return [one.last() for one in ended]


def test_nobody_comes_is_a_line_on_either_side():
  port = together.free_port()
  given = {"PIVOT_JOIN": "3"}
  how = dict(count=1, triple=False, given=given)
  (said,) = refused([f"127.0.0.1:{port},2,0"], **how)
  assert "not all of 2 processes came" in said
  (said,) = refused([f"127.0.0.1:{port},2,1"], **how)
  assert f"no answer from 127.0.0.1:{port} in 3 s" in said


def test_a_port_in_use_is_named():
  with socket.socket() as listening:
    listening.bind(("", 0))
    listening.listen()
    port = listening.getsockname()[1]
    (said,) = refused([f"127.0.0.1:{port},2,0"], count=1, triple=False)
  assert f"port {port}" in said


def test_another_count_is_refused_in_all():
  port = together.free_port()
  words = [f"127.0.0.1:{port},2,0", f"127.0.0.1:{port},3,1"]
  for said in refused(words, triple=False):
    assert "processes is 2 in process 0, 3 in process 1" in said
