"""The table of a finished sweep, read from the folders of a run."""

import json
import pathlib
import sys

from bench import sweep_table


def write_stage(run: pathlib.Path, name: str, **metrics: object) -> None:
  (run / name).mkdir()
  (run / name / "done.json").write_text(json.dumps({"metrics": metrics}))


def measured(value: float) -> dict[str, float]:
  return {"value": value, "n": 100, "se": 0.05}


def test_the_largest_rate_within_an_error_of_the_best_is_taken(
  tmp_path, monkeypatch, capsys
):
  write_stage(tmp_path, "evaluate_start", all=measured(0.2))
  for rate, value in (("1em04", 0.5), ("1em03", 0.48), ("1em02", 0.1)):
    write_stage(tmp_path, f"stage2_sft_{rate}", **{"change/vision": 0.01})
    write_stage(tmp_path, f"evaluate_sft_{rate}", all=measured(value))
  monkeypatch.setattr(sys, "argv", ["sweep_table", str(tmp_path)])
  sweep_table.main()
  said = capsys.readouterr().out
  assert "| sft | 1e-03 | 48.0 ± 5.0 | 0.0100 |" in said
  assert "So: sft 1e-03." in said
