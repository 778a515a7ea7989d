"""The report: what the arms measured, side by side, with its uncertainty.

  c.report = stage("report", title="My experiment")

Reads the folders of the stages that ran and writes `report.json` and a
self-contained `report.html`, here and at the root of the run. It computes
nothing: the comparison is report/compare.py's, the page report/page.py's.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from pivot_jax import files, goodput, processes
from pivot_jax.report import compare, page


def run(
  config: ConfigDict, inputs: Mapping[str, str], out: pathlib.Path
) -> dict[str, Any]:
  """Write the report of the stages in `inputs` (name -> folder).

  Returns the number of stages and of seeds. `report.json` holds `results`
  (numbers alone, the same for the same run), `left_out`, `stages`, `config`,
  `versions`, `seeds`, `comparison` and `goodput`. Raises InputError if arms that are
  compared on the same rows did not see them in the same order from the same
  weights.
  """
  return processes.decide("report", lambda: _write(config, inputs, out))


def _write(
  config: ConfigDict, inputs: Mapping[str, str], out: pathlib.Path
) -> dict[str, Any]:
  seeds = compare.by_seed(inputs)
  design = compare.Design.of(config)
  record = {
    "comparison": compare.same_rows(seeds, design),
    "results": compare.results(seeds, design),
    "left_out": _plain(config.get("left_out", {})),
    "stages": {
      done["stage"]: {"kind": done["kind"], "seconds": done["seconds"]}
      for stages in seeds.values()
      for done in stages.values()
    },
    "config": _run_config(config, out),
    "versions": _versions(seeds),
    "seeds": len(seeds),
    "goodput": goodput.summary(goodput.read(out.parent)),
  }
  caution = config.get("caution", "")
  said = compare.verdict(record["results"], design)
  lead = config.get("lead") or f"{said} {caution}".strip()
  title = config.get("title", "PIVOT")
  document = page.page(title, lead, record, seeds.get(0, {}), design)
  files.make_folder(out)
  for folder in (out, out.parent):
    files.write_json(folder / "report.json", record)
    files.write_text(folder / "report.html", document)
  return {"stages": len(record["stages"]), "seeds": len(seeds)}


def _run_config(config: ConfigDict, out: pathlib.Path) -> Any:
  """Return the run's config, or the report's own where there is none."""
  path = out.parent / "config.json"
  return files.read_json(path) if path.exists() else _plain(config)


def _versions(seeds: Mapping[int, compare.Stages]) -> dict[str, str]:
  """Return each package's version, all of them where stages differ."""
  found: dict[str, set[str]] = {}
  for stages in seeds.values():
    for done in stages.values():
      for name, version in done["versions"].items():
        found.setdefault(name, set()).add(version)
  return {name: ", ".join(sorted(found[name])) for name in sorted(found)}


def _plain(section: Any) -> Any:
  """Return a config section as a dict."""
  return section.to_dict() if isinstance(section, ConfigDict) else dict(section)
