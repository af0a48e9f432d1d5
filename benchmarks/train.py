"""Tokens a second of training, against the defaults of TRL and of unsloth.

    OMP_NUM_THREADS=1 python benchmarks/train.py [ROWS.jsonl] > benchmarks/train.md

Same model, adapters, rows in the same order, learning rate and steps; real tokens only, and the
held-out loss beside them. unsloth patches what it touches, so that each pair runs in a process of
its own, alternating. Machines stall: of each step, the fastest of several runs counts, and a
training's time is the sum of its steps (without the first, which warms up).
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

WHO = dict(
    kit="finetune_kit's `train`",
    trl="TRL, default settings",
    kit_unsloth="finetune_kit's `train`, loaded by unsloth",
    unsloth="unsloth, default settings",
)
PAIRS = dict(transformers=("trl", "kit"), unsloth=("unsloth", "kit_unsloth"))
SEEDS = int(os.environ.get("SEEDS", 3))
STEPS = int(os.environ.get("STEPS", 30))
RUNS = int(os.environ.get("RUNS", 3))
BATCH, LR, RANK, LONGEST = 8, 1e-3, 16, 512  # 8 is TRL's default batch
WALL, CPU = 0, 1  # places of the two clocks in a mark
INTRO = """# Training, in real tokens a second

data/tiny-base with LoRA r = {rank}, {steps} steps of {batch} rows, {data}: {mean:.0f} tokens a \
row, the longest {longest}; {threads} CPU thread(s), {machine}, torch {torch}, transformers \
{transformers}, trl {trl}; each step the fastest of {runs} alternating runs, {seeds} seed(s). \
Written by `benchmarks/train.py`.

| | tokens/s, by wall time | tokens/s, by CPU time | held-out NLL, by seed |
|:--|--:|--:|:--|"""


def lengthen(rows):
    "Questions made longer by others', in place: lengths as uneven as GSM8K's."
    rng = random.Random(0)
    for split in rows.values():
        messages = [row["messages"] for row in split if "messages" in row]
        questions = [turns[0]["content"] for turns in messages]
        for turns in messages:
            more = rng.sample(questions, min(12, int(rng.expovariate(0.25))))
            turns[0]["content"] += " " + " ".join(more)


def encoded_splits(tokenizer, source=None):
    "Rows of a file, or of the embedded domains, made longer."
    from finetune_kit.chat import encode_rows
    from finetune_kit.data import prepare_dataset

    splits = prepare_dataset(source or "data/domains")
    if not source:
        lengthen(splits)
    template = "alpaca" if source else None
    return {name: encode_rows(rows, tokenizer, template, LONGEST) for name, rows in splits.items()}


def ordered_trainer(order, with_plain_loss):
    "TRL's trainer, with rows in a given order, so that losses can be compared."
    import transformers
    import trl

    class Ordered(trl.SFTTrainer):
        def _get_train_sampler(self, *args):
            return order

    if with_plain_loss:  # without Triton, TRL's fused head has no path on a CPU
        Ordered.compute_loss = transformers.Trainer.compute_loss
    return Ordered


def each_step(tick):
    import transformers

    class Tick(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            tick()

    return Tick()


def train_stock(model, tokenizer, rows, seed, order, who, tick):
    "What the libraries' own pages show: `SFTTrainer` on a data set, nothing turned."
    import datasets
    import trl

    columns = [dict(input_ids=row["input_ids"], labels=row["labels"]) for row in rows]
    trainer = ordered_trainer(order, with_plain_loss=who == "trl")
    with tempfile.TemporaryDirectory() as folder:
        args = trl.SFTConfig(
            output_dir=folder,
            max_steps=STEPS,
            learning_rate=LR,
            warmup_steps=5,
            seed=seed,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            max_length=None,
            dataset_kwargs=dict(skip_prepare_dataset=True),
        )
        trainer(
            model=model,
            args=args,
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(columns),
            callbacks=[each_step(tick)],
        ).train()


def kit_config(seed):
    from finetune_kit.training import TrainConfig

    return TrainConfig(
        max_steps=STEPS,
        batch_size=BATCH,
        lr=LR,
        lora_r=RANK,
        warmup_steps=5,
        eval_every=0,
        seed=seed,
        save_every=0,
    )


def train_one(who, seed, model, tokenizer, rows):
    "One training: the model, marks of both clocks after each step, and the tokens of each step."
    from finetune_kit.loop import row_order, rows_by_step
    from finetune_kit.lora import add_lora
    from finetune_kit.trainer import train

    cfg, marks = kit_config(seed), []

    def tick(*_):
        marks.append((time.perf_counter(), time.process_time()))

    model = add_lora(model, RANK, seed=seed)
    if who.startswith("kit"):
        train(model, tokenizer, rows, cfg, on_log=tick)
    else:
        train_stock(model, tokenizer, rows, seed, row_order(len(rows), cfg), who, tick)
    tokens = [sum(len(row["input_ids"]) for row in step) for step in rows_by_step(rows, cfg)]
    return model, marks, tokens


def train_pair(backend, source):
    "Prints lines of results: a training by each of a pair, for each seed and run."
    from finetune_kit.loop import validation_loss
    from finetune_kit.model import load_model

    splits = None
    turns = [(s, r, who) for s in range(SEEDS) for r in range(RUNS) for who in PAIRS[backend]]
    for seed, run, who in turns:
        model, tokenizer = load_model("data/tiny-base", backend=backend, device="cpu")
        splits = splits or encoded_splits(tokenizer, source)
        rows = splits["train"]
        model, marks, tokens = train_one(who, seed, model, tokenizer, rows)
        result = dict(
            who=who,
            seed=seed,
            run=run,
            marks=marks,
            tokens=tokens,
            longest=max(len(row["input_ids"]) for row in rows),
            loss=validation_loss(model, splits["validation"][:200]) if run == 0 else None,
        )
        print("RESULT", json.dumps(result), flush=True)


def seconds(results, clock):
    "Of one who and seed: the fastest of the runs at each step, summed, on one of the clocks."
    total = 0
    for step in zip(*(pairwise(result["marks"]) for result in results), strict=True):
        total += min(end[clock] - start[clock] for start, end in step)
    return total


def read_results(backend, source):
    "The results that a process of its own prints, one by one."
    command = [sys.executable, __file__, "--pair", backend, source or ""]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        for line in process.stdout:
            if line.startswith("RESULT "):
                yield json.loads(line.removeprefix("RESULT "))
    if process.returncode:
        sys.exit(f"{backend}: exit code {process.returncode}")


def measure(source):
    "{(who, seed): the results of its runs}."
    results = {}
    for backend in PAIRS:
        for result in read_results(backend, source):
            results.setdefault((result["who"], result["seed"]), []).append(result)
            told = {name: result[name] for name in ("who", "seed", "run", "loss")}
            print(told, seconds([result], CPU), file=sys.stderr, flush=True)
    return results


def print_intro(results, source):
    import torch
    import transformers
    import trl

    first = results["kit", 0][0]
    tokens = sum(sum(results["kit", seed][0]["tokens"]) for seed in range(SEEDS))
    ragged = "ragged rows (embedded domains, questions made longer)"
    intro = INTRO.format(
        rank=RANK,
        steps=STEPS,
        batch=BATCH,
        data=f"rows of {Path(source).name}" if source else ragged,
        mean=tokens / SEEDS / STEPS / BATCH,
        longest=first["longest"],
        threads=torch.get_num_threads(),
        machine=platform.machine(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        trl=trl.__version__,
        runs=RUNS,
        seeds=SEEDS,
    )
    print(intro)


def speed(results, who, clock):
    "Tokens a second, the median of the seeds."
    of_seed = []
    for seed in range(SEEDS):
        runs = results[who, seed]
        of_seed.append(sum(runs[0]["tokens"][1:]) / seconds(runs, clock))
    return statistics.median(of_seed)


def print_factors(results, mine, other):
    wall, cpu = (speed(results, mine, c) / speed(results, other, c) for c in (WALL, CPU))
    by_seed = []
    for seed in range(SEEDS):
        factor = seconds(results[other, seed], CPU) / seconds(results[mine, seed], CPU)
        by_seed.append(f"{factor:.2f}")
    factors = f"{wall:.2f}x by wall time, {cpu:.2f}x by CPU time"
    print(f"\n{WHO[mine]} against {WHO[other]}: {factors} (seed by seed: {', '.join(by_seed)}).")


def main(source):
    results = measure(source)
    print_intro(results, source)
    for who, name in WHO.items():
        wall, cpu = (speed(results, who, clock) for clock in (WALL, CPU))
        losses = [str(round(results[who, seed][0]["loss"], 4)) for seed in range(SEEDS)]
        print(f"| {name} | {wall:,.0f} | {cpu:,.0f} | {', '.join(losses)} |")
    print_factors(results, "kit", "trl")
    print_factors(results, "kit_unsloth", "unsloth")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--pair"]:
        train_pair(sys.argv[2], sys.argv[3] or None)
    else:
        main(str(Path(sys.argv[1]).resolve()) if sys.argv[1:] else None)
