"""Puts together what two or more runs of bench.py found, of different dtypes on cards of one kind.

python benchmarks/merge.py float32.json bfloat16.json --json h200.json
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import report

# What must be the same for results to stand side by side.
SAME = ("device", "commit", "dirty", "runtime", "python", "jax", "jaxlib", "torch", "torch_cudnn")


def merge(runs: list[dict[str, Any]]) -> dict[str, Any]:
    first = runs[0]
    for other in runs[1:]:
        for key in SAME:
            ours, theirs = first["environment"][key], other["environment"][key]
            if ours != theirs:
                sys.exit(f"the runs differ in {key}: {ours!r} and {theirs!r}")
        if shared := {_case(c) for c in first["cases"]} & {_case(c) for c in other["cases"]}:
            sys.exit(f"the runs share {len(shared)} cases, such as {min(shared)}")
    merged = dict(first)
    merged["environment"] = first["environment"] | {
        "argv": [run["environment"]["argv"] for run in runs]
    }
    merged["ceilings"] = {}
    for run in runs:
        merged["ceilings"] |= run["ceilings"]
    for key in ("cases", "errors", "not_run"):
        merged[key] = [entry for run in runs for entry in run[key]]
    merged["summary"] = report.summaries(merged["cases"])
    merged["seconds"] = sum(run["seconds"] for run in runs)
    return merged


def _case(entry: dict[str, Any]) -> tuple[str, str, str, str]:
    return entry["workload"], entry["pass"], entry["dtype"], entry["layout"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="files of bench.py --json")
    parser.add_argument("--json", required=True, type=pathlib.Path, help="file for the results")
    options = parser.parse_args()
    merged = merge([json.loads(path.read_text()) for path in options.runs])
    options.json.write_text(json.dumps(merged, indent=1) + "\n")
    report.print_summary(merged["summary"])


if __name__ == "__main__":
    main()
