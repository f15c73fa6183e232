"""What a benchmark found: one record and one line a case, and geometric means."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from contestants import LAYOUTS, Case, Contestant
from timing import Timing

from workloads import RESULTS, SETS

PEERS = ("torch", "lax")


@dataclasses.dataclass
class Outcome:
    """What became of one contestant in one case."""

    contestant: Contestant
    status: str = "ok"
    error: float = 0.0
    """The largest: for ours over its bound, for a peer relative to the result."""
    prepare_s: float = math.nan
    timing: Timing | None = None

    @property
    def us(self) -> float:
        return 1e6 * self.timing.median if self.timing else math.nan

    def json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "variant": self.contestant.variant,
            "layout": self.contestant.layout,
            "status": self.status,
        }
        if self.timing:
            entry |= {
                "us": self.us,
                "us_min": 1e6 * self.timing.least,
                "samples": len(self.timing.samples),
                "error_over_bound"
                if self.contestant.owner == "ours"
                else "relative_error": self.error,
                "prepare_s": self.prepare_s,
            }
        return entry


def _fastest(outcomes: Iterable[Outcome]) -> Outcome | None:
    return min((o for o in outcomes if o.timing), key=lambda o: o.us, default=None)


def record(
    case: Case, dtype: str, own: Outcome, peers: list[Outcome], kernel: str, floor: float
) -> dict[str, Any]:
    """One case as the JSON has it. Ratios are a peer's time over ours."""
    workload, layout = case.workload, own.contestant.layout
    itemsize = jnp.dtype(case.dtype).itemsize
    seconds = own.us / 1e6
    entry: dict[str, Any] = {
        "workload": workload.name,
        "set": workload.set,
        "pass": case.pass_,
        "dtype": dtype,
        "kernel": kernel,
        "sets": case.data.sets,
        **own.json(),
        "tflops": workload.flop(case.pass_) / seconds / 1e12,
        "gbps": workload.least_bytes(itemsize, case.pass_) / seconds / 1e9,
        "floor_us": 1e6 * floor,
        "share_of_floor": floor / seconds,
        "ratio": {},
        "peers": {},
    }
    for owner in (*PEERS, "fastest"):
        ran = [o for o in peers if owner in (o.contestant.owner, "fastest")]
        best = {
            "same_layout": _fastest(o for o in ran if o.contestant.layout == layout),
            "any_layout": _fastest(ran),
        }
        entry["ratio"][owner] = {k: o.us / own.us for k, o in best.items() if o}
        if owner in PEERS:
            entry["peers"][owner] = [o.json() for o in ran]
    return entry


def _ratio(entry: dict[str, Any], owner: str) -> str:
    ratios = entry["ratio"][owner]
    texts = [f"{ratios[k]:.2f}x" if k in ratios else "-" for k in ("same_layout", "any_layout")]
    partial = any(p["status"] != "ok" for p in entry["peers"][owner])
    return " ".join(f"{t:>8}" for t in texts) + ("*" if partial else " ")


HEADER = (
    f"{'workload':<20} {'pass':<11} {'dtype':<15} {'channels':<8} {'kernel':<20} {'us':>10} "
    f"{'TFLOP/s':>8} {'GB/s':>7} {'floor':>6}  {'torch same, any':>17}  {'lax same, any':>17}  "
    "error/bound"
)


def line(entry: dict[str, Any]) -> str:
    return (
        f"{entry['workload']:<20} {entry['pass']:<11} {entry['dtype']:<15} "
        f"{entry['layout'].removeprefix('channels_'):<8} {entry['kernel']:<20} "
        f"{entry['us']:>10.1f} {entry['tflops']:>8.3g} {entry['gbps']:>7.3g} "
        f"{entry['share_of_floor']:>6.1%}  {_ratio(entry, 'torch')} {_ratio(entry, 'lax')}  "
        f"{entry['error_over_bound']:.3f}"
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """The geometric mean, None if any value is missing: a mean over fewer would flatter."""
    logs = [math.log(v) if v is not None else None for v in values]
    present = [v for v in logs if v is not None]
    return math.exp(sum(present) / len(present)) if present and len(present) == len(logs) else None


def summaries(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means by dtype, pass and set; a layout against peers in the same layout, and the
    better of our layouts against peers in any."""
    rows = []
    several = ("all",) if len({e["set"] for e in entries}) > 1 else ()
    groups = {(e["dtype"], e["pass"], s) for e in entries for s in (e["set"], *several)}
    order = (*SETS, "all")
    passes = tuple(RESULTS)
    for dtype, pass_, set_ in sorted(
        groups, key=lambda g: (g[0], passes.index(g[1]), order.index(g[2]))
    ):
        mine = [
            e
            for e in entries
            if e["dtype"] == dtype and e["pass"] == pass_ and set_ in (e["set"], "all")
        ]
        names = sorted({e["workload"] for e in mine})
        layouts = [lay for lay in LAYOUTS if any(e["layout"] == lay for e in mine)]
        better = [
            min((e for e in mine if e["workload"] == n), key=lambda e: e["us"]) for n in names
        ]
        choices = [(lay, "same_layout", [e for e in mine if e["layout"] == lay]) for lay in layouts]
        choices += [("better", "any_layout", better)] if len(layouts) > 1 else []
        for layout, which, chosen in choices:
            ratios = {
                owner: [e["ratio"][owner].get(which) for e in chosen]
                for owner in (*PEERS, "fastest")
            }
            known = [
                (r, e["workload"])
                for r, e in zip(ratios["fastest"], chosen, strict=True)
                if r is not None
            ]
            rows.append(
                {
                    "dtype": dtype,
                    "pass": pass_,
                    "set": set_,
                    "layout": layout,
                    "cases": len(chosen),
                    "time_over_floor": _mean(1 / e["share_of_floor"] for e in chosen),
                    **{owner: _mean(values) for owner, values in ratios.items()},
                    "below_1": sum(r < 1 for r, _ in known),
                    "worst": min(known, default=None),
                }
            )
    return rows


def print_summary(rows: Sequence[dict[str, Any]]) -> None:
    print(
        "\nGeometric means: time over floor, and peers' time over ours (a layout against the same "
        'layout, "better" against any)'
    )
    print(
        f"{'dtype':<15} {'pass':<11} {'set':<5} {'channels':<8} {'cases':>5} {'t/floor':>8} "
        f"{'torch':>8} {'lax':>8} {'fastest':>8} {'below 1':>8}  least"
    )
    for row in rows:
        means = " ".join(
            f"{row[k]:>8.2f}" if row[k] is not None else f"{'-':>8}"
            for k in ("time_over_floor", *PEERS, "fastest")
        )
        worst = f"{row['worst'][0]:.2f} {row['worst'][1]}" if row["worst"] else "-"
        print(
            f"{row['dtype']:<15} {row['pass']:<11} {row['set']:<5} "
            f"{row['layout'].removeprefix('channels_'):<8} {row['cases']:>5} {means} "
            f"{row['below_1']:>8}  {worst}"
        )
