"""Load, render, encode and mask against TRL's own preparation, and memory while a large file streams: OMP_NUM_THREADS=1 python benchmarks/data.py > benchmarks/data.md

The same generated rows, alternating runs in one process; CPU time beside wall time, since other work on the machine lengthens only the latter."""

import contextlib, io, json, platform, random, statistics, sys, tempfile, time
from pathlib import Path

import datasets, torch, transformers, trl
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_kit.chat import check_masks, encode_rows, stream_encoded
from finetune_kit.core import ROOT
from finetune_kit.rows import load_rows, stream_rows

ROWS, RUNS, GIGABYTES = (int(a) for a in (sys.argv[1:] + ["50000", "3", "1"][len(sys.argv) - 1 :]))
WORDS = "apple boat book bread chair cloud coat corn cup desk dog door drum duck farm fish flag foot fork frog gate gold hand hat hill horse house".split()


def conversation(rng, i):
    say = lambda n: " ".join(rng.choices(WORDS, k=rng.randint(n // 2, n)))
    turns = [
        m
        for _ in range(rng.choice([1, 1, 2]))
        for m in (
            dict(role="user", content=f"{say(20)}?"),
            dict(role="assistant", content=f"{say(40)}."),
        )
    ]
    return (
        [dict(role="system", content=f"You are assistant {i}."), *turns]
        if i % 3 == 0
        else [dict(turns[0], content=f"{i}: {turns[0]['content']}"), *turns[1:]]
    )


def ours(path, tok):
    encoded = encode_rows(load_rows(path), tok, max_length=100_000)
    check_masks(encoded, tok)
    return [e["labels"] for e in encoded]


def theirs(path, tok, model, folder):
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
    return trl.SFTTrainer(model, args, train_dataset=data, processing_class=tok).train_dataset


def timed(f):
    wall, cpu = time.perf_counter(), time.process_time()
    out = f()
    return out, time.perf_counter() - wall, time.process_time() - cpu


def rss():
    return (
        int(
            next(
                o
                for o in Path("/proc/self/status").read_text().splitlines()
                if o.startswith("VmRSS")
            ).split()[1]
        )
        / 1024
    )


def streamed(path, tok):
    "RSS in MiB before, and the largest while the file streams: read, then read and encoded (its first 20,000 rows)."
    found = []
    for what, rows, every in (
        ("read", stream_rows(path), 5000),
        (
            "read and encoded",
            stream_encoded(
                (r for _, r in zip(range(20_000), stream_rows(path))), tok, max_length=100_000
            ),
            1000,
        ),
    ):
        before, top, n, start = rss(), 0, 0, time.perf_counter()
        for n, _ in enumerate(rows, 1):
            if n % every == 0:
                top = max(top, rss())
        found.append((what, n, before, top, time.perf_counter() - start))
    return found


def main():
    datasets.disable_progress_bars()
    datasets.disable_caching()
    transformers.logging.set_verbosity_error()
    tok, model, rng = (
        AutoTokenizer.from_pretrained(ROOT / "data/tiny-base"),
        AutoModelForCausalLM.from_pretrained(ROOT / "data/tiny-base"),
        random.Random(0),
    )
    with tempfile.TemporaryDirectory() as d:
        path = Path(d) / "rows.jsonl"
        with open(path, "w") as f:
            f.writelines(
                json.dumps(dict(messages=conversation(rng, i))) + "\n" for i in range(ROWS)
            )
        times, same, tokens = [], True, 0
        for i in range(RUNS):
            labels, *a = timed(lambda: ours(path, tok))
            with contextlib.redirect_stdout(io.StringIO()):
                data, *b = timed(lambda: theirs(path, tok, model, Path(d) / str(i)))
            if not i:
                same, tokens = labels == [list(l) for l in data["labels"]], sum(map(len, labels))
            times.append((*a, *b))
        wall, cpu, wall_trl, cpu_trl = (statistics.median(t) for t in zip(*times))
        print(
            f"# Data, from file to labels\n\n{ROWS:,} generated conversations ({tokens:,} tokens) in a JSONL file; median of {RUNS} alternating run(s) in one process, {torch.get_num_threads()} thread(s); {platform.machine()}, "
            f"trl {trl.__version__}, datasets {datasets.__version__}, transformers {transformers.__version__}. Ours: `load_rows` (duplicates found), `encode_rows`, `check_masks`. TRL's: `load_dataset`, `SFTTrainer(assistant_only_loss=True)`. "
            f"The labels of both are {'equal' if same else '**not equal**'}. Written by `benchmarks/data.py`.\n"
        )
        print(
            f"| | rows/s, by CPU time | rows/s, by wall time |\n|:--|--:|--:|\n| finetune_kit | {ROWS / cpu:,.0f} | {ROWS / wall:,.0f} |\n| TRL's preparation | {ROWS / cpu_trl:,.0f} | {ROWS / wall_trl:,.0f} |\n"
            f"| **faster by** | **{cpu_trl / cpu:.2f}x** | **{wall_trl / wall:.2f}x** |\n",
            flush=True,
        )
        path.unlink()
        with open(path, "w") as f:
            n = 0
            while n < GIGABYTES * 10**9:
                n += f.write(
                    json.dumps(
                        dict(
                            messages=[
                                dict(
                                    role="user",
                                    content=f"{n}: {' '.join(rng.choices(WORDS, k=20))}?",
                                ),
                                dict(
                                    role="assistant",
                                    content=(" ".join(rng.choices(WORDS, k=50)) + ". ") * 14,
                                ),
                            ]
                        )
                    )
                    + "\n"
                )
        print(
            f"A JSONL file of {path.stat().st_size / 1e9:.2f} GB, streamed (`stream_rows`, `stream_encoded`):\n\n| | rows | RSS before, MiB | largest RSS, MiB | s |\n|:--|--:|--:|--:|--:|"
        )
        for what, n, before, top, s in streamed(path, tok):
            print(f"| {what} | {n:,} | {before:,.0f} | {top:,.0f} | {s:.0f} |", flush=True)


main()
