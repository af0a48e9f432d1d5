"""Load, render, encode and mask against TRL's preparation, and memory while a large file streams.

    OMP_NUM_THREADS=1 python benchmarks/data.py [ROWS [RUNS [GIGABYTES]]] > benchmarks/data.md

The same generated rows, alternating runs in one process. CPU time stands beside wall time, since
other work on the machine lengthens only the latter.
"""

import argparse
import contextlib
import io
import itertools
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
import transformers
import trl
from timing import Timed, timed
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_kit.chat import check_masks, encode_rows, stream_encoded
from finetune_kit.core import ROOT
from finetune_kit.rows import load_rows, stream_rows

# fmt: off
WORDS = [
    "apple", "boat", "book", "bread", "chair", "cloud", "coat", "corn", "cup", "desk", "dog",
    "door", "drum", "duck", "farm", "fish", "flag", "foot", "fork", "frog", "gate", "gold", "hand",
    "hat", "hill", "horse", "house",
]
# fmt: on
LONGEST = 100_000  # tokens: no row is left out
ENCODED_ROWS = 20_000  # of the large file


# The rows


def sentence(rng, n):
    "At most `n` words, at least half as many."
    return " ".join(rng.choices(WORDS, k=rng.randint(n // 2, n)))


def conversation(rng, i):
    "Messages of one or two turns; the number makes each conversation different."
    messages = []
    for _ in range(rng.choice([1, 1, 2])):
        messages.append(dict(role="user", content=f"{sentence(rng, 20)}?"))
        messages.append(dict(role="assistant", content=f"{sentence(rng, 40)}."))
    if i % 3 == 0:
        return [dict(role="system", content=f"You are assistant {i}."), *messages]
    messages[0]["content"] = f"{i}: {messages[0]['content']}"
    return messages


def long_conversation(rng, i):
    "One turn with an answer of 700 words."
    question = " ".join(rng.choices(WORDS, k=20))
    answer = " ".join(rng.choices(WORDS, k=50))
    return [
        dict(role="user", content=f"{i}: {question}?"),
        dict(role="assistant", content=f"{answer}. " * 14),
    ]


def json_line(messages):
    return json.dumps(dict(messages=messages)) + "\n"


def write_rows(path, rng, n_rows):
    "A file of so many conversations."
    with open(path, "w") as file:
        file.writelines(json_line(conversation(rng, i)) for i in range(n_rows))


def write_large(path, rng, n_bytes):
    "A file of at least so many bytes."
    written = 0
    with open(path, "w") as file:
        while written < n_bytes:
            written += file.write(json_line(long_conversation(rng, written)))


# From file to labels


def prepare_by_kit(path, tokenizer):
    "Labels of each row."
    encoded = encode_rows(load_rows(path), tokenizer, max_length=LONGEST)
    check_masks(encoded, tokenizer)
    return [row["labels"] for row in encoded]


def prepare_by_trl(path, tokenizer, model, folder):
    "A data set with `labels`, as the trainer would train on it."
    data = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder))
    args = trl.SFTConfig(
        output_dir=str(folder),
        assistant_only_loss=True,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    return trainer.train_dataset


class Preparation(NamedTuple):
    "Alternating runs of both, and whether they agree."

    kit: list[Timed]
    trl: list[Timed]
    n_tokens: int
    is_equal: bool  # the labels of the first run


def compare_preparations(path, folder, runs):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny-base")
    model = AutoModelForCausalLM.from_pretrained(ROOT / "data/tiny-base")
    kit_runs = []
    trl_runs = []
    for n in range(runs):
        kit_run = timed(prepare_by_kit, path, tokenizer)
        with contextlib.redirect_stdout(io.StringIO()):
            trl_run = timed(prepare_by_trl, path, tokenizer, model, folder / str(n))
        if n == 0:
            labels = kit_run.result
            is_equal = labels == [list(row) for row in trl_run.result["labels"]]
            n_tokens = sum(len(row) for row in labels)
        # The rows are not needed again: only the times stay in memory
        kit_runs.append(kit_run._replace(result=None))
        trl_runs.append(trl_run._replace(result=None))
    return Preparation(kit_runs, trl_runs, n_tokens, is_equal)


def report_preparations(preparation, n_rows):
    runs = len(preparation.kit)
    wall = statistics.median(run.wall for run in preparation.kit)
    cpu = statistics.median(run.cpu for run in preparation.kit)
    trl_wall = statistics.median(run.wall for run in preparation.trl)
    trl_cpu = statistics.median(run.cpu for run in preparation.trl)
    return f"""# Data, from file to labels

{n_rows:,} generated conversations ({preparation.n_tokens:,} tokens) in a JSONL file; \
median of {runs} alternating run(s) in one process, {torch.get_num_threads()} thread(s); \
{platform.machine()}, trl {trl.__version__}, datasets {datasets.__version__}, \
transformers {transformers.__version__}. \
Ours: `load_rows` (duplicates found), `encode_rows`, `check_masks`. \
TRL's: `load_dataset`, `SFTTrainer(assistant_only_loss=True)`. \
The labels of both are {"equal" if preparation.is_equal else "**not equal**"}. \
Written by `benchmarks/data.py`.

| | rows/s, by CPU time | rows/s, by wall time |
|:--|--:|--:|
| finetune_kit | {n_rows / cpu:,.0f} | {n_rows / wall:,.0f} |
| TRL's preparation | {n_rows / trl_cpu:,.0f} | {n_rows / trl_wall:,.0f} |
| **faster by** | **{trl_cpu / cpu:.2f}x** | **{trl_wall / wall:.2f}x** |
"""


# Memory while a file streams


def resident_mib():
    "The memory of this process that is in RAM."
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmRSS; this benchmark needs Linux")


class Streamed(NamedTuple):
    n_rows: int
    before: float  # resident memory, in MiB
    largest: float
    seconds: float


def measure_stream(rows, every):
    "Go through the rows; look at the memory every so many rows."
    before = resident_mib()
    largest = before
    n_rows = 0
    start = time.perf_counter()
    for _ in rows:
        n_rows += 1
        if n_rows % every == 0:
            largest = max(largest, resident_mib())
    return Streamed(n_rows, before, largest, time.perf_counter() - start)


def report_stream(label, streamed):
    return (
        f"| {label} | {streamed.n_rows:,} | {streamed.before:,.0f} | {streamed.largest:,.0f} "
        f"| {streamed.seconds:.0f} |"
    )


def measure_large_file(path):
    "Print a line as soon as it is measured: each takes minutes."
    print(f"A JSONL file of {path.stat().st_size / 1e9:.2f} GB, ", end="")
    print("streamed (`stream_rows`, `stream_encoded`):\n")
    print("| | rows | RSS before, MiB | largest RSS, MiB | s |\n|:--|--:|--:|--:|--:|")
    streamed = measure_stream(stream_rows(path), every=5000)
    print(report_stream("read", streamed), flush=True)

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny-base")
    first_rows = itertools.islice(stream_rows(path), ENCODED_ROWS)
    encoded = stream_encoded(first_rows, tokenizer, max_length=LONGEST)
    print(report_stream("read and encoded", measure_stream(encoded, every=1000)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=int, nargs="?", default=50_000, help="conversations")
    parser.add_argument("runs", type=int, nargs="?", default=3, help="alternating runs")
    parser.add_argument("gigabytes", type=float, nargs="?", default=1, help="of the large file")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    transformers.logging.set_verbosity_error()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "rows.jsonl"
        write_rows(path, rng, args.rows)
        preparation = compare_preparations(path, folder, args.runs)
        print(report_preparations(preparation, args.rows), flush=True)
        write_large(path, rng, args.gigabytes * 10**9)
        measure_large_file(path)


if __name__ == "__main__":
    main()
