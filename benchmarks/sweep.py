"""A sweep against the same runs through papermill's command line, one after another.

    python benchmarks/sweep.py [CUTS [STEPS [JOBS]]] > benchmarks/sweep.md

All begin with an empty registry and make the control once. The numbers that come out must be the
same to the last digit, whether kernels start warm or cold.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from finetune_kit.core import ROOT

DEFAULTS = ["3", "20", "2"]
n_given = len(sys.argv) - 1
CUTS, STEPS, JOBS = (int(number) for number in sys.argv[1:] + DEFAULTS[n_given:])
FIXED = dict(max_steps=STEPS, eval_every=0, eval_items=24)
BASELINE = "papermill, one after another"


def run_results(folder):
    "Run → its status and what it measured, but for times."
    results = {}
    for file in Path(folder).glob("*/run.json"):
        info = json.loads(file.read_text())
        metrics = {name: value for name, value in info["metrics"].items() if name != "training"}
        results[info["id"]] = (info["status"], metrics)
    return results


def run_command(command, folder, **options):
    "A command whose runs go into a folder."
    env = os.environ | dict(FINETUNE_KIT_RUNS=folder)
    subprocess.run(command, check=True, cwd=ROOT, env=env, **options)


def one_by_one(folder, scratch):
    "Each cut by papermill's command."
    for layer in range(CUTS):
        command = [sys.executable, "-m", "papermill", "nbs/train.ipynb", f"{scratch}/{layer}.ipynb"]
        command.append("--no-progress-bar")
        for name, value in (FIXED | dict(drop_layer=layer)).items():
            command += ["-p", name, str(value)]
        run_command(command, folder, capture_output=True)


def as_sweep(folder, scratch, *options):
    "All cuts by one command."
    spec = dict(fixed=FIXED, grid=dict(drop_layer=list(range(CUTS))))
    Path(scratch, "cuts.json").write_text(json.dumps(spec))
    program = str(Path(sys.executable).parent / "finetune-kit")
    command = [program, "sweep", f"{scratch}/cuts.json", "--jobs", str(JOBS), *options]
    run_command(command, folder, stdout=sys.stderr)


def as_cold_sweep(folder, scratch):
    "As `as_sweep`, each kernel started anew."
    as_sweep(folder, scratch, "--cold")


def timed(make_runs):  # (seconds, run → result)
    "Make the runs in an empty registry."
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        make_runs(folder, scratch)
        return time.perf_counter() - start, run_results(folder)


def conditions():
    "What the times hold for."
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    return (
        f"{CUTS} cuts of `data/tiny-base` and their control, {STEPS} steps each, 24 items; "
        f"{JOBS} at a time, $OMP_NUM_THREADS {threads}, {os.cpu_count()} cores, "
        f"{platform.machine()}, load {os.getloadavg()[0]:.1f}, one run of each."
    )


def main():
    ways = {
        "finetune-kit sweep": as_sweep,
        "finetune-kit sweep --cold": as_cold_sweep,
        BASELINE: one_by_one,
    }
    seconds = {}
    results = {}
    for name, make_runs in ways.items():
        seconds[name], results[name] = timed(make_runs)
    # As text, in which a NaN equals a NaN
    is_same = len({json.dumps(result, sort_keys=True) for result in results.values()}) == 1
    print(f"# A sweep\n\n{conditions()}\n")
    print("| | wall s | share |\n|:--|--:|--:|")
    for name in ways:
        print(f"| {name} | {seconds[name]:.0f} | {seconds[name] / seconds[BASELINE]:.2f} |")
    print(f"\nThe numbers are {'the same to the last digit' if is_same else 'NOT the same'}.")
    if not is_same:
        sys.exit(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
