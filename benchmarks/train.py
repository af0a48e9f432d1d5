"""Tokens a second of training, against the defaults of TRL and of unsloth: OMP_NUM_THREADS=1 python benchmarks/train.py [ROWS.jsonl] > benchmarks/train.md

Same model, adapters, rows in the same order, learning rate and steps; real tokens only, and the held-out loss beside them. unsloth patches what it touches, so that each pair runs in a process of its own, alternating.
Machines stall: of each step, the fastest of several runs counts, and a training's time is the sum of its steps (without the first, which warms up)."""

import json, os, platform, random, statistics, subprocess, sys, tempfile, time
from pathlib import Path

WHO = dict(
    kit="finetune_kit's `train`",
    trl="TRL, default settings",
    kit_unsloth="finetune_kit's `train`, loaded by unsloth",
    unsloth="unsloth, default settings",
)
PAIRS = dict(transformers=("trl", "kit"), unsloth=("unsloth", "kit_unsloth"))
SEEDS, STEPS, RUNS = (
    int(os.environ.get(k, usual)) for k, usual in dict(SEEDS=3, STEPS=30, RUNS=3).items()
)
BATCH, LR, RANK, LONGEST = 8, 1e-3, 16, 512  # 8 is TRL's default batch


def ragged(tokenizer, source=None):
    "Rows of a file, or of the embedded domains with each row's question made longer by others': lengths as uneven as GSM8K's."
    from finetune_kit.chat import encode_rows
    from finetune_kit.data import prepare_dataset

    splits, rng = prepare_dataset(source or "data/domains"), random.Random(0)
    for rows in () if source else splits.values():
        asked = [r["messages"][0]["content"] for r in rows if "messages" in r]
        for r in rows:
            if "messages" in r:
                r["messages"][0]["content"] += " " + " ".join(
                    rng.sample(asked, min(12, int(rng.expovariate(0.25))))
                )
    return {
        s: encode_rows(rows, tokenizer, None if not source else "alpaca", LONGEST)
        for s, rows in splits.items()
    }


def stock(model, tokenizer, train, seed, order, backend, tick):
    "What the libraries' own pages show: `SFTTrainer` on a data set, nothing turned."
    import datasets, transformers, trl

    class Ordered(
        trl.SFTTrainer
    ):  # the same rows in the same order, so that losses can be compared
        def _get_train_sampler(self, *args):
            return order

        if backend == "trl":
            compute_loss = (
                transformers.Trainer.compute_loss
            )  # without Triton, TRL's fused head has no CPU path

    class Tick(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            tick()

    with tempfile.TemporaryDirectory() as d:
        args = trl.SFTConfig(
            output_dir=d,
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
        Ordered(
            model=model,
            args=args,
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(
                [dict(input_ids=e["input_ids"], labels=e["labels"]) for e in train]
            ),
            callbacks=[Tick()],
        ).train()


def pair(backend, source):
    "Lines of results: a training by each of a pair, for each seed and run."
    from finetune_kit.model import add_lora, load_model
    from finetune_kit.training import TrainConfig, row_order
    from finetune_kit.loop import validation_loss
    from finetune_kit.trainer import train

    splits = None
    for seed in range(SEEDS):
        for run in range(RUNS):
            for who in PAIRS[backend]:
                model, tokenizer = load_model("data/tiny-base", backend=backend, device="cpu")
                splits = splits or ragged(tokenizer, source)
                cfg = TrainConfig(
                    max_steps=STEPS,
                    batch_size=BATCH,
                    lr=LR,
                    lora_r=RANK,
                    warmup_steps=5,
                    eval_every=0,
                    seed=seed,
                    save_every=0,
                )
                order, marks = row_order(len(splits["train"]), cfg), []
                model, tick = (
                    add_lora(model, RANK, seed=seed),
                    lambda *_: marks.append((time.perf_counter(), time.process_time())),
                )
                if who.startswith("kit"):
                    train(model, tokenizer, splits["train"], cfg, on_log=tick)
                else:
                    stock(model, tokenizer, splits["train"], seed, order, who, tick)
                steps = [
                    sum(
                        len(splits["train"][i]["input_ids"])
                        for i in order[s * BATCH : (s + 1) * BATCH]
                    )
                    for s in range(STEPS)
                ]
                print(
                    "RESULT",
                    json.dumps(
                        dict(
                            who=who,
                            seed=seed,
                            run=run,
                            marks=marks,
                            tokens=steps,
                            longest=max(len(e["input_ids"]) for e in splits["train"]),
                            loss=validation_loss(model, splits["validation"][:200])
                            if run == 0
                            else None,
                        )
                    ),
                    flush=True,
                )


def seconds(found, clock):
    "Of one who and seed: the fastest of the runs at each step, summed, on one of the clocks."
    return sum(
        min(b[clock] - a[clock] for a, b in step)
        for step in zip(*(list(zip(f["marks"], f["marks"][1:])) for f in found))
    )


def main(source):
    import torch, transformers, trl

    found = []
    for backend in PAIRS:
        with subprocess.Popen(
            [sys.executable, __file__, "--pair", backend, source or ""],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        ) as done:
            for line in done.stdout:
                if not line.startswith("RESULT "):
                    continue
                found.append(json.loads(line[7:]))
                print(
                    {k: found[-1][k] for k in ("who", "seed", "run", "loss")},
                    seconds(found[-1:], 1),
                    file=sys.stderr,
                    flush=True,
                )
        if done.returncode:
            sys.exit(f"{backend}: exit code {done.returncode}")
    tokens = sum(sum(f["tokens"]) for f in found if f["who"] == "kit" and f["run"] == 0)
    print(
        f"# Training, in real tokens a second\n\ndata/tiny-base with LoRA r = {RANK}, {STEPS} steps of {BATCH} rows, {'rows of ' + Path(source).name if source else 'ragged rows (embedded domains, questions made longer)'}: {tokens / SEEDS / STEPS / BATCH:.0f} tokens a row, the longest {found[0]['longest']}; "
        f"{torch.get_num_threads()} CPU thread(s), {platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}; each step the fastest of {RUNS} alternating runs, {SEEDS} seed(s). Written by `benchmarks/train.py`.\n"
    )
    print(
        "| | tokens/s, by wall time | tokens/s, by CPU time | held-out NLL, by seed |\n|:--|--:|--:|:--|"
    )
    speed = {}
    for who, name in WHO.items():
        mine = [
            [f for f in found if f["who"] == who and f["seed"] == seed] for seed in range(SEEDS)
        ]
        speed[who] = [
            statistics.median(sum(m[0]["tokens"][1:]) / seconds(m, clock) for m in mine)
            for clock in (0, 1)
        ]
        print(
            f"| {name} | {speed[who][0]:,.0f} | {speed[who][1]:,.0f} | {', '.join(str(round(m[0]['loss'], 4)) for m in mine)} |"
        )
    for mine, other in (("kit", "trl"), ("kit_unsloth", "unsloth")):
        by_seed = [
            seconds([f for f in found if f["who"] == other and f["seed"] == s], 1)
            / seconds([f for f in found if f["who"] == mine and f["seed"] == s], 1)
            for s in range(SEEDS)
        ]
        print(
            f"\n{WHO[mine]} against {WHO[other]}: {speed[mine][0] / speed[other][0]:.2f}x by wall time, {speed[mine][1] / speed[other][1]:.2f}x by CPU time (seed by seed: {', '.join(f'{r:.2f}' for r in by_seed)})."
        )


if sys.argv[1:2] == ["--pair"]:
    pair(sys.argv[2], sys.argv[3] or None)
else:
    main(str(Path(sys.argv[1]).resolve()) if sys.argv[1:] else None)
