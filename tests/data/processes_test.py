"""Two processes read their shares of one stream, and notice unequal files."""

import json
import os
import socket
import subprocess
import sys

from tests.data import streams_test

READ = """
import itertools, json, sys
from pivot_jax import processes
host, port, size = sys.argv[1:]
share = processes.start(f"localhost:{port},2,{host}")
from pivot_jax.data import feed
from tests.data import streams_test
stream = streams_test.stream(size=int(size))
feed.check_processes(stream)
found = feed.read(
  stream, batch=6, start=12, share=feed.Share(*share), threads=2
)
print(json.dumps([one.id for one in itertools.islice(found, 30)]))
processes.finish()
"""


def run(sizes):
  """Return [(exit status, output, errors)] of a process for each size."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  started = [
    subprocess.Popen(
      [sys.executable, "-c", READ, str(host), str(port), str(size)],
      env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for host, size in enumerate(sizes)
  ]
  ended = [process.communicate(timeout=120) for process in started]
  return [(process.returncode, *said) for process, said in zip(started, ended)]


def test_two_processes_share_a_stream_without_overlap():
  found = []
  for status, said, errors in run((40, 40)):
    assert status == 0, errors
    found.append(json.loads(said.splitlines()[-1]))
  straight = streams_test.first(60, 12, 0)
  for update in range(10):
    parts = [x[3 * update : 3 * update + 3] for x in found]
    assert parts[0] + parts[1] == straight[6 * update : 6 * update + 6]


def test_a_process_with_fewer_rows_is_named_before_anything_is_read():
  for status, _, errors in run((40, 39)):
    assert status != 0
    assert "rows is [40] in process 0, [39] in process 1" in errors
