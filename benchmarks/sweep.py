"""A sweep against the same runs through papermill's command line, one after another: python benchmarks/sweep.py [CUTS [STEPS [JOBS]]] > benchmarks/sweep.md

Both begin with an empty registry and make the control once. The numbers that come out must be the same to the last digit, warm or cold."""

import json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path

from finetune_kit.core import ROOT

CUTS, STEPS, JOBS = (int(a) for a in (sys.argv[1:] + ["3", "20", "2"][len(sys.argv) - 1 :]))
FIXED = dict(max_steps=STEPS, eval_every=0, eval_items=24)


def results(folder):
    "Run → what it came to."
    infos = [json.loads(f.read_text()) for f in Path(folder).glob("*/run.json")]
    return {
        i["id"]: (i["status"], {s: m for s, m in i["metrics"].items() if s != "training"})
        for i in infos
    }


def one_by_one(folder, out):
    for layer in range(CUTS):
        pairs = [o for k, v in (FIXED | dict(drop_layer=layer)).items() for o in ("-p", k, str(v))]
        subprocess.run(
            [
                sys.executable,
                "-m",
                "papermill",
                str(ROOT / "nbs/train.ipynb"),
                f"{out}/{layer}.ipynb",
                "--no-progress-bar",
                *pairs,
            ],
            check=True,
            capture_output=True,
            cwd=ROOT,
            env=os.environ | dict(FINETUNE_KIT_RUNS=folder),
        )


def as_sweep(folder, out, *options):
    Path(out, "cuts.json").write_text(
        json.dumps(dict(fixed=FIXED, grid=dict(drop_layer=list(range(CUTS)))))
    )
    subprocess.run(
        [
            str(Path(sys.executable).parent / "finetune-kit"),
            "sweep",
            f"{out}/cuts.json",
            "--jobs",
            str(JOBS),
            *options,
        ],
        check=True,
        stdout=sys.stderr,
        cwd=ROOT,
        env=os.environ | dict(FINETUNE_KIT_RUNS=folder),
    )


def main():
    took, found = {}, {}
    for name, f in (
        ("finetune-kit sweep", as_sweep),
        ("finetune-kit sweep --cold", lambda *folders: as_sweep(*folders, "--cold")),
        ("papermill, one after another", one_by_one),
    ):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            f(folder, out)
            took[name], found[name] = time.perf_counter() - start, results(folder)
    same = len({json.dumps(r, sort_keys=True) for r in found.values()}) == 1
    print(
        f"# A sweep\n\n{CUTS} cuts of `data/tiny-base` and their control, {STEPS} steps each, 24 items; {JOBS} at a time, $OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}, {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}, one run of each.\n"
    )
    print("| | wall s | share |\n|:--|--:|--:|")
    for name, seconds in took.items():
        print(f"| {name} | {seconds:.0f} | {seconds / took['papermill, one after another']:.2f} |")
    print(f"\nThe numbers are {'the same to the last digit' if same else 'NOT the same'}.")
    if not same:
        sys.exit(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
