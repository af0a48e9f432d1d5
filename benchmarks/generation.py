"""Batched answers against one prompt at a time, and a registry of 1,000 runs listed: OMP_NUM_THREADS=1 python benchmarks/generation.py [ITEMS [RUNS]] > benchmarks/generation.md

The same prompts on the same model, alternating in one process; the greedy texts must be identical. CPU time beside wall time, since other work on the machine lengthens only the latter."""

import os, platform, statistics, sys, tempfile, time
from pathlib import Path

import torch, transformers

from finetune_kit.rows import load_rows
from finetune_kit.infer import generate
from finetune_kit.model import load_model
from finetune_kit.record import Run
from finetune_kit.registry import list_runs

ITEMS, RUNS = (int(a) for a in (sys.argv[1:] + ["64", "3"][len(sys.argv) - 1 :]))


def timed(f, *args):
    wall, cpu = time.perf_counter(), time.process_time()
    out = f(*args)
    return out, time.perf_counter() - wall, time.process_time() - cpu


def registry(n):
    "Seconds to list `n` runs, each as a finished train run writes it, with one evaluation beside it."
    state = dict(
        nll=1.0,
        perplexity=2.7,
        n_tokens=900,
        n_items=100,
        exact_match=0.5,
        token_f1=0.6,
        intervals={k: [0.9, 1.1] for k in ("nll", "perplexity", "exact_match", "token_f1")},
    )
    with tempfile.TemporaryDirectory() as d:
        os.environ["FINETUNE_KIT_RUNS"] = d
        for i in range(n):
            run = Run(Path(d) / f"train-drop{i % 12}-{i:08x}")
            run.save(
                id=run.id,
                experiment="train",
                status="done",
                plan="11 of 12 layers",
                seed=i,
                started=float(i),
                config={f"dial_{k}": k for k in range(34)},
                hashes={k: "ab12cd34ef56" for k in "abcdef"},
                metrics={s: state for s in ("base", "cut", "healed", "control")},
                versions={f"package{k}": "1.2.3" for k in range(9)},
            )
            run.save_evaluation("gsm8k", "ab12", dict(base=state, tuned=state))
        return [timed(list_runs)[1:] for _ in range(5)]


def main():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model, tok = load_model("data/tiny-base", backend="transformers")
    rows = [r for r in load_rows("data/domains", "test") if "messages" in r][:ITEMS]
    prompts = [r["messages"][:-1] for r in rows]
    ways = {
        "one by one": lambda: generate(model, tok, prompts, 40, 1),
        "in batches of 32": lambda: generate(model, tok, prompts, 40, 32),
    }
    found = {way: [] for way in ways}
    generate(model, tok, prompts[:2], 4)
    for _ in range(RUNS):
        for way, f in ways.items():
            found[way].append(timed(f))
    texts = {tuple(out) for runs in found.values() for out, _, _ in runs}
    if len(texts) != 1:
        sys.exit("the texts differ")
    print(
        f"# Generation\n\n{len(prompts)} conversations of `data/domains`, `data/tiny-base` (12 layers, 2.5M parameters, fp32), up to 40 new tokens, greedy, {torch.get_num_threads()} thread(s), medians of {RUNS} alternating runs; torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.\n"
    )
    print(
        "| | wall s | CPU s | times as fast (wall) | times as fast (CPU) |\n|:--|--:|--:|--:|--:|"
    )
    mid = {
        way: [statistics.median(r[i] for r in runs) for i in (1, 2)] for way, runs in found.items()
    }
    for way, (wall, cpu) in mid.items():
        print(
            f"| {way} | {wall:.2f} | {cpu:.2f} | {mid['one by one'][0] / wall:.1f} | {mid['one by one'][1] / cpu:.1f} |"
        )
    print(f"\nAll {len(prompts)} texts are identical.\n")
    listed = registry(1000)
    print(
        f"`list_runs()` on 1,000 runs, each with an evaluation: {statistics.median(w for w, _ in listed):.2f} s wall, {statistics.median(c for _, c in listed):.2f} s CPU (median of {len(listed)})."
    )


if __name__ == "__main__":
    main()
