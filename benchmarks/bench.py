"""Measures jaxconv against torch and lax, side by side: one line a case, geometric means last.

    python benchmarks/bench.py seed kb --pass forward --dtype float32,bfloat16 --json FILE

README.md beside this file says what a line means and how it is measured.
"""

import argparse
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import math
import os
import pathlib
import platform as host
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import contestants
import jax
import jax.extend
import jax.numpy as jnp
import report
import timing
from contestants import LAX_VARIANTS, LAYOUTS, Case, Contestant, Data, NumpyArrays, TorchArrays

import jaxconv
from workloads import RESULTS, SETS, Role, Workload, select

# What a name of the command line is: the arrays' dtype, and lax's precision.
DTYPES: dict[str, tuple[str, Any]] = {
    "float32": ("float32", None),
    "float32-highest": ("float32", timing.HIGHEST),
    "bfloat16": ("bfloat16", None),
    "float16": ("float16", None),
}
QUICK = {
    "cuda": ("s0_kb72", "s4_kb71", "nnunet_128_64", "depthwise2d", "hifigan_64_32"),
    "cpu": ("cpu_s3_kb58", "cpu_monai_64_16", "cpu_grouped_32_32", "cpu_mimi_512"),
}
# Peers round as they like, but one whose error is so large, in norm, computes something else.
PEER_TOLERANCE = 0.05
ROOT = pathlib.Path(__file__).resolve().parent.parent


def check(case: Case, outcome: report.Outcome, out: Any, expected: dict[Role, Any]) -> None:
    """Notes the largest error of any result, and raises where that is too much: for ours as a share
    of its bound, for peers in norm."""
    results = outcome.contestant.results(out)
    for role, result in zip(case.roles, results, strict=True):
        wanted = expected[role]
        if tuple(result.shape) != tuple(wanted.shape):
            raise ArithmeticError(f"wrong: {role} has shape {result.shape}, not {wanted.shape}")
        if outcome.contestant.owner == "ours":
            error, limit = contestants.error_over_bound(case, role, result, wanted), 1.0
        else:
            error, limit = contestants.relative_error(case, result, wanted), PEER_TOLERANCE
        if not error <= limit:
            raise ArithmeticError(f"wrong: the error of {role} is {error:.3g}, over {limit}")
        outcome.error = max(outcome.error, error)


def measure(
    case: Case,
    entered: Sequence[Contestant],
    expected: dict[Role, Any],
    timer: timing.Timer,
    budget_s: float,
    torch: Any,
) -> list[report.Outcome]:
    """Prepares, checks, and then times. Peers that are not yet prepared after `budget_s` are not
    run. A GPU's memory is for one contestant at a time; on a CPU their samples are interleaved."""
    outcomes = [report.Outcome(c) for c in entered]
    start = time.perf_counter()
    for group in [outcomes] if case.platform == "cpu" else [[o] for o in outcomes]:
        runners: dict[int, timing.Runner] = {}
        for index, outcome in enumerate(group):
            contestant, began = outcome.contestant, time.perf_counter()
            if contestant.owner != "ours" and began - start > budget_s:
                outcome.status = f"skipped: the case took more than {budget_s:g} s"
                continue
            try:
                runner = contestant.prepare()
                outcome.prepare_s = time.perf_counter() - began
                check(case, outcome, runner.once(), expected)
                runners[index] = runner
            except Exception as exception:
                outcome.status = _explain(exception, trace=contestant.owner == "ours")
        try:
            for index, result in timer.time(runners).items():
                group[index].timing = result
        except Exception as exception:
            for index in runners:
                group[index].status = _explain(exception)
        runners.clear()
        _release(torch)
    return outcomes


def _explain(exception: Exception, trace: bool = True) -> str:
    if trace:
        traceback.print_exception(exception, file=sys.stderr)
    first = (str(exception).strip() or "no message").splitlines()[0]
    return f"error: {type(exception).__name__}: {first[:300]}"


def _release(torch: Any) -> None:
    gc.collect()
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def floor_s(workload: Workload, pass_: Any, dtype: str, ceilings: dict[str, float]) -> float:
    """The time that no version can beat by much: arithmetic or memory, whichever takes longer."""
    itemsize = jnp.dtype(DTYPES[dtype][0]).itemsize
    return max(
        workload.flop(pass_) / ceilings[dtype],
        workload.least_bytes(itemsize, pass_) / ceilings["copy"],
    )


# ---------------------------------------------------------------------------------------------
# The run


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _device_name(platform: str) -> str:
    if platform == "cuda":
        return jax.devices()[0].device_kind
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")]
    return f"{models[0] if models else host.processor()}, {os.cpu_count()} threads"


def environment(platform: str, torch: Any, commit: str | None) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    status = _git("status", "--porcelain")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": sys.argv[1:],
        "device": _device_name(platform),
        "runtime": " ".join(jax.extend.backend.get_backend().platform_version.split()),
        "commit": commit or _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "load": os.getloadavg()[0],
        "python": host.python_version(),
        "jaxconv": jaxconv.__version__,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "torch": torch.__version__ if torch else None,
        "torch_cuda": torch.version.cuda if torch else None,
        "torch_cudnn": torch.backends.cudnn.version() if torch else None,
        "torch_threads": torch.get_num_threads() if torch else None,
    }


def _list(allowed: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        values = text.split(",")
        for value in values:
            if value not in allowed:
                raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(allowed)}")
        return values

    return parse


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "workloads",
        nargs="*",
        help=f"names, globs, or sets ({', '.join(SETS)}); default: seed kb net, on a CPU cpu",
    )
    add("--platform", choices=("cpu", "cuda"), help="default: cuda where jax finds a GPU")
    add(
        "--pass",
        dest="passes",
        type=_list(tuple(RESULTS)),
        default=["forward", "input_grad", "weight_grad"],
        help=f"of {', '.join(RESULTS)}, comma-separated; default: the first three",
    )
    add(
        "--dtype",
        dest="dtypes",
        type=_list(tuple(DTYPES)),
        default=["float32"],
        help=f"of {', '.join(DTYPES)}; default: float32 (TF32 products on a GPU)",
    )
    add("--layout", dest="layouts", type=_list(LAYOUTS), default=list(LAYOUTS), help="of ours")
    add("--implementation", help="a kernel's name, to force it")
    add(
        "--peers",
        type=_list((*report.PEERS, "none")),
        default=list(report.PEERS),
        help="of torch, lax; or none",
    )
    add(
        "--variants",
        type=lambda text: text.split(","),
        default=["*"],
        help="globs of the peers' settings to run: torch-{first,last}[-benchmark|-heuristic]"
        f"[-dense], lax-{{{','.join(LAX_VARIANTS)}}}; default: all",
    )
    add(
        "--no-lax-wgrad",
        action="store_true",
        help="leave lax out of weight_grad and step, where one call can take a second",
    )
    add("--quick", action="store_true", help="a few workloads, fewer samples")
    add("--rounds", type=int, help="samples a contestant; default: 5, quick 3")
    add("--case-budget", type=float, default=20.0, help="seconds a case may take to start peers in")
    add("--time-limit", type=float, default=math.inf, help="seconds to start cases in")
    add("--json", type=pathlib.Path, help="file for the results")
    add("--commit", help="commit to report, where the checkout came without its history")
    return parser.parse_args()


def start(options: argparse.Namespace) -> tuple[str, Any]:
    """Chooses the platform and brings up jax and torch on it."""
    # Both frameworks need memory of the one GPU; see also _release.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    if options.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    platform = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if options.platform not in (None, platform):
        sys.exit(f"jax finds no {options.platform} device")
    torch = contestants.import_torch()
    if torch is None and "torch" in options.peers:
        sys.exit("torch is not installed: give --peers lax or --peers none")
    if torch is not None and platform == "cuda" and not torch.cuda.is_available():
        sys.exit("this torch has no CUDA: install one that has, or none")
    return platform, torch


class Run:
    """One run: what is asked for, what it runs on, and the results so far, as the JSON has them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.began = options, time.perf_counter()
        self.platform, self.torch = start(options)
        gpu = self.platform == "cuda"
        self.timer = timing.timer(self.platform, options.rounds or (3 if options.quick else 5))
        quick = QUICK[self.platform] if options.quick else ()
        default = quick or (("seed", "kb", "net") if gpu else ("cpu",))
        self.workloads = select(options.workloads or default)
        self.results: dict[str, Any] = {
            "environment": environment(self.platform, self.torch, options.commit),
            "platform": self.platform,
            "method": dataclasses.asdict(self.timer)
            | {"rotated_bytes": contestants.ROTATED_BYTES, "most_sets": contestants.MOST_SETS},
            "lax_without_weight_grad": options.no_lax_wgrad,
            "ceilings": timing.ceilings(
                self.timer, self.torch, self.platform, {d: DTYPES[d] for d in options.dtypes}
            ),
            "call_overhead": timing.call_overhead(),
            "cases": [],
            "errors": [],
            "not_run": [],
            "summary": [],
        }
        _release(self.torch)

    def print_head(self) -> None:
        for key, value in self.results["environment"].items():
            print(f"{key}: {value}")
        for name, value in self.results["ceilings"].items():
            unit = "GB/s, read + write" if name == "copy" else "GFLOP/s, matrix product"
            print(f"ceiling {name}: {value / 1e9:.1f} {unit}")
        for name, cost in self.results["call_overhead"].items():
            print(
                f"one jitted call of {name}: {cost['us']:.1f} us on a tiny problem, "
                f"compiled in {cost['compile_ms']:.0f} ms"
            )
        print(f"\n{report.HEADER}", flush=True)

    def failed(self, what: str, status: str) -> None:
        print(f"{what}: {status}", flush=True)
        self.results["errors"].append({"case": what, "status": status})

    def save(self) -> None:
        """After every case, so that a run that is cut short keeps what it has."""
        path = self.options.json
        if path is None:
            return
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1) + "\n")
        partial.replace(path)

    def run(self) -> int:
        """Returns the exit code: 1 if anything asked for failed or was not run."""
        self.print_head()
        for workload in self.workloads:
            for dtype in self.options.dtypes:
                self._run_workload(workload, dtype)
                _release(self.torch)
        rows = report.summaries(self.results["cases"])
        self.results["summary"] = rows
        self.results["seconds"] = time.perf_counter() - self.began
        self.save()
        report.print_summary(rows)
        print(f"\n{self.results['seconds']:.0f} s")
        for kind in ("errors", "not_run"):
            for entry in self.results[kind]:
                print(f"{kind}: {entry}")
        return 1 if self.results["errors"] or self.results["not_run"] else 0

    def _run_workload(self, workload: Workload, dtype: str) -> None:
        """All passes of one workload in one dtype, on the same data."""
        name, precision = DTYPES[dtype]
        data: Data | None = None
        expected: dict[Role, Any] = {}
        for pass_ in self.options.passes:
            what = f"{workload.name} {pass_} {dtype}"
            if time.perf_counter() - self.began > self.options.time_limit:
                self.results["not_run"].append(f"{what}: time limit")
                continue
            try:
                if data is None:
                    device = TorchArrays(self.torch, self.platform) if self.torch else NumpyArrays()
                    data = Data(workload, name, self.platform, device)
                case = Case(workload, pass_, name, precision, self.platform, data)
                for role in case.roles:
                    if role not in expected:
                        expected[role] = contestants.reference(case, role, self.torch)
                self._run_case(case, dtype, what, expected)
            except Exception as exception:
                self.failed(what, _explain(exception))
            self.save()

    def _run_case(self, case: Case, dtype: str, what: str, expected: dict[Role, Any]) -> None:
        options = self.options
        own = [contestants.ours(case, lay, options.implementation) for lay in options.layouts]
        names = [n for n in options.peers if n != "none"]
        if options.no_lax_wgrad and "w" in case.roles:
            names = [n for n in names if n != "lax"]
        others = contestants.peers(case, names, self.torch, options.variants)
        outcomes = measure(
            case, [*own, *others], expected, self.timer, options.case_budget, self.torch
        )
        mine, peers = outcomes[: len(own)], outcomes[len(own) :]
        floor = floor_s(case.workload, case.pass_, dtype, self.results["ceilings"])
        for outcome in mine:
            layout = outcome.contestant.layout
            if outcome.timing is None:
                self.failed(f"{what} {layout} ours", outcome.status)
                continue
            kernel = contestants.kernel_name(case, layout, options.implementation)
            entry = report.record(case, dtype, outcome, peers, kernel, floor)
            self.results["cases"].append(entry)
            print(report.line(entry), flush=True)
        for owner in names:
            ran = [o for o in peers if o.contestant.owner == owner]
            for outcome in ran:
                if outcome.status != "ok":
                    variant = outcome.contestant.variant
                    print(f"  {what} {owner} {variant}: {outcome.status}", flush=True)
            if ran and not any(o.timing for o in ran):
                self.failed(f"{what} {owner}", "no variant of this peer ran")


if __name__ == "__main__":
    sys.exit(Run(arguments()).run())
