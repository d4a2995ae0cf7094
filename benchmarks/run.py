"""Curvature matrices and their products: geoad against plain PyTorch and every library that is installed.

For each row all candidates run in one process, interleaved, in another order every round; ratios are medians of the ratios
round by round. Every result is compared with plain PyTorch in float64 in the same run, and peak memory is measured in a fresh
process.
Prints Markdown: a table of all rows, one of who takes part, and one for each row. Run: ``python benchmarks/run.py``.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import rivals as rivals  # registers its candidates
import torch
from candidates import CANDIDATES, LIBRARIES, UNRANKED, library, version
from harness import Timing, machine, paired, peak, seconds
from plain import Result, reference
from workloads import ROWS, Row, Work


@dataclass
class Outcome:
    """What one candidate did in one row.

    Attributes:
        error: the relative error against float64; None if it failed.
        seconds: its rounds.
        once: it is slow, and ran once only.
        memory: MB, in a process of its own.
        failure: the message of the exception it raised.
    """

    error: float | None = None
    seconds: Timing | None = None
    once: bool = False
    memory: float = float("nan")
    failure: str = ""

    def right(self, row: Row) -> bool:
        return self.error is not None and self.error <= row.tolerance


Outcomes = dict[str, Outcome]


def relative_error(found: Result, true: Result) -> float:
    """‖found - true‖ / ‖true‖, the largest of several; of dicts only the keys of `found`. nan where the shapes differ."""
    if isinstance(found, dict):
        assert isinstance(true, dict), "a dict is compared with a dict"
        return _largest([relative_error(part, true[key]) for key, part in found.items()])
    if isinstance(found, list):
        parts = zip(found, true, strict=True) if len(found) == len(true) else []
        return _largest([relative_error(a, b) for a, b in parts])
    assert isinstance(true, torch.Tensor), "a tensor is compared with a tensor"
    if found.shape != true.shape:
        return float("nan")
    a, b = found.detach().cpu().double(), true.detach().cpu().double()
    return float((a - b).norm() / b.norm())


def _largest(errors: list[float]) -> float:
    """nan if there is none or one is nan."""
    return float(torch.tensor(errors).max()) if errors else float("nan")


# -- measuring -----------------------------------------------------------------------------------------------------------------


def compared(w: Work, chosen: list[str]) -> Outcomes:
    """Run every candidate once, and compare its result with the reference."""
    true, found = reference(w), dict[str, Outcome]()
    for name in chosen:
        outcome = found[name] = Outcome()
        net, results = w.copy(), list[Result]()
        call = functools.partial(CANDIDATES[w.row.name][name], w, net)
        torch.manual_seed(0)
        try:
            outcome.seconds = Timing(name, [seconds(lambda call=call, results=results: results.append(call()))])
            outcome.error = relative_error(results[0], true)
        except Exception as error:
            outcome.failure = f"{type(error).__name__}: {error}"
        note(f"  {name}: {describe_first(outcome)}")
    return found


def timed(w: Work, found: Outcomes, rounds: int, slow: float) -> None:
    """Time the candidates that gave a result; those slower than `slow` keep their one run.

    Short times are noisy: those near the fastest run up to ten times as many rounds, for 20 s in all.
    """
    first = {name: o.seconds.median for name, o in found.items() if o.seconds is not None and not o.failure}
    for name in first:
        found[name].once = first[name] > slow
    quick = [name for name in first if not found[name].once]
    near = [name for name in quick if name == "geoad" or first[name] <= 5 * min(first.values())]

    def prepare(i: int) -> tuple[Work, torch.nn.Module]:
        torch.manual_seed(i + 1)
        return w, w.copy()

    def run(names: list[str], rounds: int, warmup: int) -> None:
        jobs = {name: CANDIDATES[w.row.name][name] for name in names}
        for name, timing in paired(jobs, rounds=rounds, warmup=warmup, prepare=prepare).items():
            timings[name].seconds.extend(timing.seconds)

    timings = {name: Timing(name, []) for name in quick}
    run(quick, rounds, warmup=int(sum(first[name] for name in quick) < 5))
    run(near, min(9 * rounds, int(20 / sum(first[name] for name in near))) if near else 0, warmup=0)
    for name, timing in timings.items():
        found[name].seconds = timing


def memory(row: Row, name: str, device: str, options: list[str]) -> float:
    """The memory (MB) that one call adds to a fresh process, in which a call for two samples came before."""
    words = [sys.executable, __file__, "--peak", row.name, name, "--device", device, *options]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        note(f"  {name}: its memory was not measured: {' '.join(done.stderr.splitlines()[-1:])}")
        return float("nan")
    return float(done.stdout.split()[-1])


def print_memory(row: Row, name: str, device: str, samples: int | None, scale: float) -> None:
    """What `memory` starts."""
    for n in (2, samples):
        w = Work(row, samples=n, scale=scale, device=device, trained=False)
        net = w.copy()
        with peak(device) as found:
            CANDIDATES[row.name][name](w, net)
    print(found.megabytes)  # pyright: ignore


def measured(row: Row, arguments: argparse.Namespace, device: str) -> Outcomes:
    """All candidates of a row on one device."""
    note(f"{row.name} on {device}: {row.title}")
    w = Work(row, samples=arguments.samples, scale=arguments.scale, device=device)
    chosen = [name for name in CANDIDATES[row.name] if version(library(name)) and takes_part(name, arguments.only)]
    found = compared(w, chosen)
    timed(w, found, arguments.rounds, arguments.slow)
    options = ["--threads", str(arguments.threads), "--scale", str(arguments.scale)]
    options += ["--samples", str(arguments.samples)] if arguments.samples else []
    for name, outcome in found.items():
        if arguments.memory and not outcome.failure:
            outcome.memory = memory(row, name, device, options)
    return found


def takes_part(name: str, only: str) -> bool:
    return not only or library(name) in ("geoad", *only.split(","))


def note(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def describe_first(outcome: Outcome) -> str:
    if outcome.failure or outcome.seconds is None:
        return outcome.failure
    return f"{outcome.seconds.median:.3f} s, error {outcome.error:.1e}"


# -- tables --------------------------------------------------------------------------------------------------------------------


def ratio(found: Outcomes, name: str) -> float:
    """Seconds of `name` over those of geoad; nan where one has none."""
    ours, theirs = found.get("geoad", Outcome()).seconds, found[name].seconds
    return float("nan") if ours is None or theirs is None or found["geoad"].failure else theirs.ratio(ours)


def fastest(row: Row, found: Outcomes) -> str | None:
    """The fastest rival whose result is right."""
    ranked = [n for n, o in found.items() if n != "geoad" and n not in UNRANKED and o.right(row)]
    times = {name: ratio(found, name) for name in ranked}
    return min(ranked, key=lambda name: times[name] if times[name] == times[name] else _median(found[name]), default=None)


def _median(outcome: Outcome) -> float:
    return float("inf") if outcome.seconds is None else outcome.seconds.median


def level(row: Row, found: Outcomes) -> bool:
    """True if geoad is right and no rival is faster."""
    rival = fastest(row, found)
    ours = found.get("geoad", Outcome())
    return ours.right(row) and (rival is None or ratio(found, rival) >= 1)


def number(x: float | None, form: str) -> str:
    return "–" if x is None or x != x else format(x, form)


def yes(x: bool | None) -> str:
    return {None: "–", True: "yes", False: "**no**"}[x]


def bound(row: Row, found: Outcomes) -> float:
    """The memory that geoad may take, in MB; nan where nothing is required or the rival is absent."""
    if row.memory is None:
        return float("nan")
    rival, factor = row.memory
    return factor * next((o.memory for n, o in found.items() if rival in (n, library(n)) and o.right(row)), float("nan"))


def summary(results: dict[str, Outcomes], cuda: dict[str, Outcomes] | None) -> str:
    """One line for each row."""
    also = " CUDA: geoad, s | CUDA: rival / geoad |" if cuda else ""
    lines = [
        f"| row | geoad, s | fastest rival | its s | its s / geoad's | target | met | MB | at most, MB | met | error |{also}",
        "|---" * (11 + 2 * bool(cuda)) + "|",
    ]
    for name, found in results.items():
        row, ours, rival = ROWS[name], found.get("geoad", Outcome()), fastest(ROWS[name], found)
        times = ratio(found, rival) if rival else None
        most = bound(row, found)
        error = "failed" if ours.error is None else f"{ours.error:.0e}" + ("" if ours.right(row) else " **WRONG**")
        met = None if row.target is None or times is None else ours.right(row) and times >= row.target
        cells = [f"{name}: {row.title}", _seconds(ours), rival or "–", _seconds(found[rival]) if rival else "–"]
        cells += [number(times, ".2f")]
        cells += [number(row.target, ".1f"), yes(met), number(ours.memory, ".0f"), number(most, ".0f")]
        cells += [yes(None if most != most else ours.memory <= most), error]
        if cuda:
            there = cuda.get(name, {})
            best = fastest(row, there)
            cells += [_seconds(there.get("geoad", Outcome())), number(ratio(there, best) if best else None, ".2f")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(outcome: Outcome) -> str:
    if outcome.seconds is None or outcome.failure:
        return "–"
    return f"{outcome.seconds.median:.3g}" + (" (once)" if outcome.once else "")


def support(results: dict[str, Outcomes]) -> str:
    """Which library has which row."""
    lines = [f"| library | version | {' | '.join(results)} |", "|---" * (2 + len(results)) + "|"]
    for name in LIBRARIES:
        installed = version(name)
        cells = [name, installed or "not installed"]
        for row, found in results.items():
            words = [_standing(ROWS[row], found.get(each)) for each in CANDIDATES[row] if library(each) == name]
            cells.append(next((word for word in ("yes", "WRONG", "fails", "there") if word in words), "–"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _standing(row: Row, outcome: Outcome | None) -> str:
    if outcome is None:
        return "there"  # an adapter, but not run
    return "fails" if outcome.failure else "yes" if outcome.right(row) else "WRONG"


def details(name: str, found: Outcomes, device: str) -> str:
    """All candidates of a row, the fastest first."""
    row = ROWS[name]
    lines = [
        f"### {name}: {row.title} ({device})\n",
        "| candidate | s | s / geoad's | MB | error | |",
        "|---|---|---|---|---|---|",
    ]
    for each, o in sorted(found.items(), key=lambda item: _median(item[1])):
        if o.failure:
            lines.append(f"| {each} | – | – | – | – | fails: {' '.join(o.failure.split())[:160].replace('|', '/')} |")
            continue
        remark = "not ranked" if each in UNRANKED else ""
        remark = remark if o.right(row) else "**WRONG**"
        cells = [each, _seconds(o), number(ratio(found, each), ".2f"), number(o.memory, ".0f"), number(o.error, ".0e"), remark]
        lines.append(f"| {' | '.join(cells)} |")
    absent = sorted({library(each) for each in CANDIDATES[name] if not version(library(each))})
    return "\n".join(lines) + (f"\n\nNot installed: {', '.join(absent)}." if absent else "")


def report(results: dict[str, dict[str, Outcomes]]) -> str:
    """Everything in Markdown, for results by device and row."""
    main = next(iter(results))
    parts = [*(machine(device) for device in results), summary(results[main], results.get("cuda") if main != "cuda" else None)]
    parts += ["Who takes part (WRONG: beyond the tolerance of the row):\n\n" + support(results[main])]
    parts += [details(name, found, device) for device, by_row in results.items() for name, found in by_row.items()]
    return "\n\n".join(parts) + "\n"


# -- the command line ----------------------------------------------------------------------------------------------------------


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help="names of rows, separated by commas (default: all)")
    parser.add_argument(
        "--only", default="", help="libraries beside geoad, separated by commas (default: all that are installed)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="at least; short rows get up to ten times as many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cpu, and cuda too if there is one")
    parser.add_argument("--slow", type=float, default=30.0, help="candidates slower than this many seconds run once")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip the processes that measure memory")
    parser.add_argument("--samples", type=int, help="instead of those of the row, for a quick look")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the widths of the networks, for a quick look")
    parser.add_argument("--out", type=Path, help="write the tables to this file too, after every row")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if geoad is wrong, or slower than a rival, in some row"
    )
    parser.add_argument("--peak", nargs=2, metavar=("ROW", "CANDIDATE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.rows.split(",") if name not in ROWS]
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    return arguments


def main(words: list[str] | None = None) -> int:
    arguments = parsed(words)
    warnings.filterwarnings("ignore")  # the libraries' own
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, as in matrix products
    if arguments.peak:
        row, name = arguments.peak
        print_memory(ROWS[row], name, arguments.device or "cpu", arguments.samples, arguments.scale)
        return 0
    devices = [arguments.device] if arguments.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    results: dict[str, dict[str, Outcomes]] = {device: {} for device in devices}
    for device, by_row in results.items():
        for name in arguments.rows.split(","):
            by_row[name] = measured(ROWS[name], arguments, device)
            if arguments.out:
                arguments.out.write_text(report(results), encoding="utf-8")
    print(report(results))
    behind = [
        f"{name} ({device})" for device, rows in results.items() for name, each in rows.items() if not level(ROWS[name], each)
    ]
    if behind:
        note(f"geoad is not level with the fastest rival: {', '.join(behind)}")
    return int(arguments.check and bool(behind))


if __name__ == "__main__":
    sys.exit(main())
