"""Start the scripts of `launch/` where programs of clouds are stand-ins."""

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterable

from tests.fixtures import programs

LAUNCH = programs.ROOT / "launch"
GOLDEN = programs.ROOT / "tests" / "golden" / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))
# Quoting has to survive every shell on its way.
HARD = (
  '--config.stage2_dpo.lr=((".*",1e-4),)',
  "--config.note=it's $HOME `x` \\ a  b; *",
)
FLAGS = ("--config=configs/pivot.py", *HARD)


class Place:
  """A folder with a home, stand-ins for programs, and a WORKDIR."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.bin = folder / "bin"
    self.workdir = folder / "shared (1)" / "run.x"
    self.bin.mkdir()
    self.env = {
      "PATH": f"{self.bin}:{os.environ['PATH']}",
      "HOME": str(folder),
      "HOSTNAME": "here",
      "LC_ALL": "C.UTF-8",
      "PLACE": str(folder),
      "PROGRESS": "0",
      "TPU_LOCK": str(folder / "lock"),
    }

  def program(self, name: str, text: str, shell: str = "/bin/bash") -> None:
    """Put a stand-in for a program on PATH."""
    path = self.bin / name
    path.write_text(f"#!{shell}\n{text}", "utf-8")
    path.chmod(0o755)

  def start(
    self, script: str | pathlib.Path, *words: str, **env: str
  ) -> subprocess.Popen[str]:
    """Start a script of the tree in a group of processes of its own."""
    return subprocess.Popen(
      [LAUNCH / script, *words],
      cwd=self.folder,
      env=self.env | env,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    )

  def run(
    self, script: str | pathlib.Path, *words: str, **env: str
  ) -> tuple[int, str]:
    """Return the exit code of a script, and what it says."""
    return end(self.start(script, *words, **env))

  def shown(self, text: str) -> str:
    """Return a text with names for folders, as golden texts have them."""
    text = text.replace(str(programs.ROOT), "/checkout")
    return text.replace(str(self.folder), "/f")

  def flags(self) -> tuple[str, ...]:
    """Return flags of a run, with one that is hard to quote."""
    return (*FLAGS, f"--workdir={self.workdir}")

  def lines(self, name: str) -> list[str]:
    """Return the lines that a stand-in has written, none if it has not run."""
    path = self.folder / name
    return path.read_text("utf-8").splitlines() if path.exists() else []

  def write(self, name: str, lines: Iterable[object]) -> None:
    """Write what a stand-in reads."""
    text = "".join(f"{line}\n" for line in lines)
    (self.folder / name).write_text(text, "utf-8")


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
  """Return the exit code of a process, and what it has said."""
  try:
    said, _ = process.communicate(timeout=30)
  finally:
    process.kill()
    if process.stdout is not None:
      process.stdout.close()
  return process.returncode, said


def checkout(folder: pathlib.Path) -> None:
  """Make a small repository with `launch/`, committed."""
  shutil.copytree(LAUNCH, folder / "launch")
  who = ["-c", "user.name=a", "-c", "user.email=a@b"]
  for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "One"]):
    subprocess.run(["git", *words], cwd=folder, check=True)


def golden(name: str) -> str:
  """Return a golden text."""
  return (GOLDEN / name).read_text("utf-8")


# A program as the one that is launched: it writes its arguments, ends with the
# code that is next in `codes`, and where that is `wait` when SIGTERM comes.
PYTHON = f"""#!{sys.executable}
import os, pathlib, signal, sys, time
place = pathlib.Path(os.environ["PLACE"])
me = os.environ.get("JAX_PROCESS_ID", os.environ["HOSTNAME"])
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append(1))
starts = place / f"starts-{{me}}"
number = len(starts.read_text().splitlines()) if starts.exists() else 0
with starts.open("a") as file:
  print(sys.argv[1:], file=file)
codes = place / f"codes-{{me}}"
code = codes.read_text().split()[number] if codes.exists() else "0"
print("running", flush=True)
if code == "wait":
  while not got:
    time.sleep(0.02)
  time.sleep(0.5)
  print("signals", len(got), flush=True)
  code = 75
sys.exit(int(code))
"""
