"""The follower three ways in one run: exact solution, the paper's program (cvxpy + HiGHS), and the released SLSQP.

    python measurements/worst_case.py --sizes 20 100 1000 --seconds 60

Exact solution and program see the same margins and must agree to 1e-8 before they are timed. Every method climbs the
sizes until its next run would not fit into its budget of ``--seconds``. What takes under a second is timed five times, the
methods taking turns, each time with enough calls in a row to fill a tenth of a second; the median is printed. The exact
solution runs on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from openrlhf_sgpo.dro import program, slsqp, solve_worst_case

SIZES = (20, 100, 1000, 10_000, 60_000, 1_000_000)
RADIUS = 0.05
PIECES = 6
REPEATS = 5
AGREEMENT = 1e-8
# Exponents of N by which the time of the next size is foreseen, before it is tried.
GROWTH = {"exact": 1.0, "program": 2.0, "slsqp": 2.5}


@dataclass
class Method:
    """One column of the comparison: ``solve(margins)`` returns (value, distance or None)."""

    name: str
    space: str
    solve: Callable[[torch.Tensor], tuple[float, float | None]]
    spent: float = 0.0
    last_size: int = 0
    last_seconds: float = 0.0
    cold: dict[int, float] = field(default_factory=dict)
    rows: dict[int, tuple[float, float | None, list[float]]] = field(default_factory=dict)

    def fits(self, size: int, budget: float) -> bool:
        return self.spent + self.last_seconds * (size / self.last_size) ** GROWTH[self.name] <= budget

    def run(self, margins: torch.Tensor, calls: int = 1) -> None:
        """Solve ``calls`` times back to back and note the mean."""
        size = len(margins)
        begin = time.perf_counter()
        for _ in range(calls):
            value, distance = self.solve(margins)
        seconds = (time.perf_counter() - begin) / calls
        self.spent += seconds * calls
        self.last_size, self.last_seconds = size, seconds
        times = self.rows[size][2] if size in self.rows else []
        self.rows[size] = (value, distance, [*times, seconds])


def methods(space: str) -> list[Method]:
    def exact(margins: torch.Tensor) -> tuple[float, None]:
        return solve_worst_case(margins, RADIUS, space=space, pieces=PIECES).value, None

    def reference(margins: torch.Tensor) -> tuple[float, None]:
        return program(margins, RADIUS, space=space, pieces=PIECES).value, None

    def released(margins: torch.Tensor) -> tuple[float, float]:
        solution = slsqp(margins, RADIUS, pieces=PIECES)
        return solution.value, solution.distance

    chosen = [Method("exact", space, exact), Method("program", space, reference)]
    return chosen + ([Method("slsqp", space, released)] if space == "probability" else [])


def compare(space: str, sizes: list[int], budget: float) -> list[Method]:
    generator = torch.Generator().manual_seed(0)
    contestants = methods(space)
    open_methods = list(contestants)
    for method in contestants:
        method.solve(torch.tensor([-1.0, 0.5, 2.0]))  # imports and first calls are not what is measured
        # A solve cannot be interrupted: a small one tells which sizes fit into the budget.
        method.run(torch.randn(20, dtype=torch.float64))
        method.rows.clear()
    for size in sizes:
        margins = torch.randn(size, dtype=torch.float64, generator=generator)
        open_methods = [method for method in open_methods if method.fits(size, budget)]
        for method in open_methods:
            method.run(margins)
        values = {method.name: method.rows[size][0] for method in open_methods}
        if {"exact", "program"} <= values.keys():
            difference = abs(values["exact"] - values["program"])
            assert difference <= AGREEMENT, f"{space}, N = {size}: exact and program differ by {difference:.1e}"
        quick = [method for method in open_methods if method.last_seconds < 1.0]
        for method in quick:
            method.cold[size] = method.last_seconds
            method.rows[size][2].clear()  # that run was the warm-up
        for _ in range(REPEATS):
            for method in quick:
                # As timeit does: enough calls in a row that the clock and cold caches do not count.
                method.run(margins, calls=max(1, round(0.1 / method.last_seconds)))
    return contestants


def report(contestants: list[Method], sizes: list[int]) -> None:
    for size in sizes:
        for method in contestants:
            start = f"{method.space:12} {size:>9} {method.name:8}"
            if size not in method.rows:
                print(f"{start} {'beyond the budget':>27}")
                continue
            value, distance, times = method.rows[size]
            overshoot = "" if distance is None else f"{100 * (distance / RADIUS - 1):+.0f}%"
            seconds = statistics.median(times)
            print(f"{start} {value:14.9f} {seconds:12.6f} {len(times):>4} {overshoot:>6}")
    timed = {method.name: method for method in contestants if 1000 in method.rows and method.rows[1000][2]}
    if {"exact", "program"} <= timed.keys():
        exact, reference = (statistics.median(timed[name].rows[1000][2]) for name in ("exact", "program"))
        line = f"{contestants[0].space}: program / exact at N = 1000: {reference / exact:.0f}x"
        if 1000 in timed["exact"].cold:
            line += f" (a single call, right after other work: {reference / timed['exact'].cold[1000]:.0f}x)"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of margins N")
    parser.add_argument("--seconds", type=float, default=120.0, help="time budget of each method")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = sorted(arguments.sizes)
    print(f"radius {RADIUS}, {PIECES} pieces, standard normal margins, median seconds; overshoot: W1 used over radius")
    print(f"{'space':12} {'N':>9} {'method':8} {'value':>14} {'seconds':>12} {'runs':>4} {'ball':>6}")
    for space in ("margin", "probability"):
        report(compare(space, sizes, arguments.seconds), sizes)


if __name__ == "__main__":
    main()
