"""Batched answers against one prompt at a time, and a registry of 1,000 runs listed.

    OMP_NUM_THREADS=1 python benchmarks/generation.py [ITEMS [RUNS]] > benchmarks/generation.md

The same prompts on the same model, alternating in one process; the greedy texts must be identical.
CPU time stands beside wall time, since other work on the machine lengthens only the latter.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from timing import timed

from finetune_kit.infer import generate
from finetune_kit.model import load_model
from finetune_kit.record import Run
from finetune_kit.registry import list_runs
from finetune_kit.rows import load_rows

MAX_NEW_TOKENS = 40
BATCH_SIZES = {"one by one": 1, "in batches of 32": 32}
BASELINE = "one by one"
LISTED_RUNS = 1000


class Seconds(NamedTuple):
    "Medians over runs."

    wall: float
    cpu: float


def median_seconds(runs):
    wall = statistics.median(run.wall for run in runs)
    return Seconds(wall, statistics.median(run.cpu for run in runs))


# Answers


def time_answers(model, tokenizer, prompts, n_runs):
    "Way → its runs; the ways alternate."
    runs = {way: [] for way in BATCH_SIZES}
    generate(model, tokenizer, prompts[:2], 4)  # warms up
    for _ in range(n_runs):
        for way, batch_size in BATCH_SIZES.items():
            run = timed(generate, model, tokenizer, prompts, MAX_NEW_TOKENS, batch_size)
            runs[way].append(run)
    return runs


def has_same_texts(runs):
    "Whether all ways gave the same answers in all runs."
    texts = set()
    for of_one_way in runs.values():
        texts.update(tuple(run.result) for run in of_one_way)
    return len(texts) == 1


def report_answers(runs, n_prompts):
    seconds = {way: median_seconds(of_one_way) for way, of_one_way in runs.items()}
    baseline = seconds[BASELINE]
    table = ""
    for way, (wall, cpu) in seconds.items():
        speed_up = f"{baseline.wall / wall:.1f} | {baseline.cpu / cpu:.1f}"
        table += f"| {way} | {wall:.2f} | {cpu:.2f} | {speed_up} |\n"
    return f"""# Generation

{n_prompts} conversations of `data/domains`, `data/tiny-base` (12 layers, 2.5M parameters, fp32), \
up to {MAX_NEW_TOKENS} new tokens, greedy, {torch.get_num_threads()} thread(s), \
medians of {len(runs[BASELINE])} alternating runs; torch {torch.__version__}, \
transformers {transformers.__version__}, {platform.machine()}, \
load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.

| | wall s | CPU s | times as fast (wall) | times as fast (CPU) |
|:--|--:|--:|--:|--:|
{table}
All {n_prompts} texts are identical.
"""


# The registry

METRICS = ("nll", "perplexity", "exact_match", "token_f1")
SUMMARY = dict(
    nll=1.0,
    perplexity=2.7,
    n_tokens=900,
    n_items=100,
    exact_match=0.5,
    token_f1=0.6,
    intervals={metric: [0.9, 1.1] for metric in METRICS},
)


def write_run(folder, i):
    "A run as training leaves it when it is done, with one evaluation."
    run = Run(folder / f"train-drop{i % 12}-{i:08x}")
    run.save(
        id=run.id,
        experiment="train",
        status="done",
        plan="11 of 12 layers",
        seed=i,
        started=float(i),
        config={f"dial_{k}": k for k in range(34)},
        hashes=dict.fromkeys("abcdef", "ab12cd34ef56"),
        metrics=dict.fromkeys(("base", "cut", "healed", "control"), SUMMARY),
        versions={f"package{k}": "1.2.3" for k in range(9)},
    )
    run.save_evaluation("gsm8k", "ab12", dict(base=SUMMARY, tuned=SUMMARY))


def time_listing(n_runs):
    "List so many runs, five times."
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FINETUNE_KIT_RUNS"] = folder
        for i in range(n_runs):
            write_run(Path(folder), i)
        return [timed(list_runs) for _ in range(5)]


def report_listing(listings):
    wall, cpu = median_seconds(listings)
    return (
        f"`list_runs()` on {LISTED_RUNS:,} runs, each with an evaluation: "
        f"{wall:.2f} s wall, {cpu:.2f} s CPU (median of {len(listings)})."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("items", type=int, nargs="?", default=64, help="conversations")
    parser.add_argument("runs", type=int, nargs="?", default=3, help="alternating runs")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model, tokenizer = load_model("data/tiny-base", backend="transformers")
    conversations = [row for row in load_rows("data/domains", "test") if "messages" in row]
    prompts = [row["messages"][:-1] for row in conversations[: args.items]]
    runs = time_answers(model, tokenizer, prompts, args.runs)
    if not has_same_texts(runs):
        sys.exit("the texts differ")
    print(report_answers(runs, len(prompts)), flush=True)
    print(report_listing(time_listing(LISTED_RUNS)))


if __name__ == "__main__":
    main()
