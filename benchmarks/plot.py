"""Draws the share of the floor that each contestant reaches, by workload, from results of bench.py.

    python benchmarks/plot.py benchmarks/results/FILE.json [MORE.json]

writes docs/FILE-DTYPE.png for every dtype in the results: a column a pass, a row a workload. A peer
is shown at its best setting in any layout.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workloads import RESULTS, WORKLOADS

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Legend, marker, size and colour of what the dots show, in the order drawn.
SERIES = (
    ("lax, best setting", "x", 28, "tab:orange"),
    ("torch, best setting", "+", 42, "tab:blue"),
    ("jaxconv, channels last", "o", 22, "tab:green"),
    ("jaxconv, channels first", "s", 22, "black"),
)


def shares(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Floor over time, of one workload and pass, for each of SERIES that was measured."""
    found: dict[str, float] = {}
    for entry in entries:
        found[f"jaxconv, {entry['layout'].replace('_', ' ')}"] = entry["share_of_floor"]
        for owner in ("lax", "torch"):
            ratio = entry["ratio"][owner].get("any_layout")
            if ratio is not None:
                found[f"{owner}, best setting"] = entry["share_of_floor"] / ratio
    return found


def draw_pass(axes: Axes, names: Sequence[str], entries: Sequence[dict[str, Any]]) -> None:
    found = [shares([e for e in entries if e["workload"] == name]) for name in names]
    axes.hlines(range(len(names)), 0, 100, color="0.9", linewidth=0.8, zorder=0)
    for label, marker, size, colour in SERIES:
        points = [(100 * s[label], row) for row, s in enumerate(found) if label in s]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=size, marker=marker, color=colour, label=label)
    axes.set_xlim(0, max(100.0, axes.get_xlim()[1]))
    axes.set_xlabel("share of the floor, %")


def draw(results: dict[str, Any], entries: Sequence[dict[str, Any]], dtype: str) -> Figure:
    passes = [p for p in RESULTS if any(e["pass"] == p for e in entries)]
    measured = {e["workload"] for e in entries}
    names = [w.name for w in WORKLOADS if w.name in measured]
    figure = Figure(figsize=(2 + 3.4 * len(passes), 1.8 + 0.24 * len(names)), layout="constrained")
    grid = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    for axes, pass_ in zip(grid, passes, strict=True):
        draw_pass(axes, names, [e for e in entries if e["pass"] == pass_])
        axes.set_title(pass_.replace("_", " "))
    grid[0].set_yticks(range(len(names)), names)
    grid[0].invert_yaxis()
    legend: dict[str, Any] = {}
    for axes in grid:
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=len(SERIES))
    where = results["environment"]
    commit = (where["commit"] or "unknown")[:9] + (" and changes" if where["dirty"] else "")
    figure.suptitle(f"{dtype} on {where['device']}, {where['date'][:10]}, commit {commit}")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs", help="folder; docs")
    options = parser.parse_args()
    for path in options.results:
        results = json.loads(path.read_text())
        for dtype in sorted({e["dtype"] for e in results["cases"]}):
            entries = [e for e in results["cases"] if e["dtype"] == dtype]
            target = options.out / f"{path.stem}-{dtype}.png"
            draw(results, entries, dtype).savefig(target, dpi=110)
            print(target)


if __name__ == "__main__":
    main()
