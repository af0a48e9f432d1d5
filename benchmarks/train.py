"""Tokens a second of training, against the defaults of TRL and of unsloth: OMP_NUM_THREADS=2 python benchmarks/train.py > benchmarks/train.md

Who trains runs in a process of its own (unsloth patches what it touches); runs alternate. Same model, adapters, rows in the same order, learning rate and steps; real tokens only, and the held-out loss beside them.
CPU time is measured beside wall time, since other work on the machine lengthens only the latter."""
import json, os, platform, statistics, subprocess, sys, tempfile, time
from pathlib import Path

WHO = dict(kit="finetune_kit's `train`", trl="TRL, default settings", unsloth="unsloth, default settings", kit_unsloth="finetune_kit's `train`, loaded by unsloth")
SEEDS, STEPS = int(os.environ.get("SEEDS", 3)), int(os.environ.get("STEPS", 60))
BATCH, LR, RANK = 8, 1e-3, 16   # 8 is TRL's default batch


def ragged(tokenizer):
    "The embedded domains, each row's question made longer by others': lengths as uneven as GSM8K's."
    import random
    from finetune_kit.chat import encode_rows
    from finetune_kit.data import prepare_dataset
    splits, rng = prepare_dataset("data/domains"), random.Random(0)
    for rows in splits.values():
        asked = [r["messages"][0]["content"] for r in rows if "messages" in r]
        for r in rows:
            if "messages" in r: r["messages"][0]["content"] += " " + " ".join(rng.sample(asked, min(6, int(rng.expovariate(.7)))))
    return {s: encode_rows(rows, tokenizer) for s, rows in splits.items()}


def stock(model, tokenizer, train, seed, order, backend):
    "What the libraries' own pages show: `SFTTrainer` on a data set, nothing turned."
    import datasets, torch, transformers, trl

    class Ordered(trl.SFTTrainer):   # the same rows in the same order, so that losses can be compared
        def _get_train_sampler(self, *args): return order
        if backend == "trl": compute_loss = transformers.Trainer.compute_loss   # without Triton, TRL's fused head has no CPU path

    with tempfile.TemporaryDirectory() as d:
        args = trl.SFTConfig(output_dir=d, max_steps=STEPS, learning_rate=LR, warmup_steps=5, seed=seed, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no", max_length=None, dataset_kwargs=dict(skip_prepare_dataset=True))
        trainer = Ordered(model=model, args=args, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list([dict(input_ids=e["input_ids"], labels=e["labels"]) for e in train]))
        return timed(trainer.train)


def timed(f):
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter()-wall, time.process_time()-cpu


def one(who, seed):
    from finetune_kit.model import add_lora, load_model
    from finetune_kit.trainer import TrainConfig, row_order, train, validation_loss
    model, tokenizer = load_model("data/tiny-base", backend="unsloth" if "unsloth" in who else "transformers", device="cpu")
    splits = ragged(tokenizer)
    cfg = TrainConfig(max_steps=STEPS, batch_size=BATCH, lr=LR, lora_r=RANK, warmup_steps=5, eval_every=0, seed=seed, save_every=0)
    order = row_order(len(splits["train"]), cfg)
    model = add_lora(model, RANK, seed=seed)
    if who.startswith("kit"): wall, cpu = timed(lambda: train(model, tokenizer, splits["train"], cfg))
    else: wall, cpu = stock(model, tokenizer, splits["train"], seed, order, who)
    tokens = sum(len(splits["train"][i]["input_ids"]) for i in order)
    print("RESULT", json.dumps(dict(who=who, seed=seed, wall=wall, cpu=cpu, tokens=tokens, loss=validation_loss(model, splits["validation"][:200]))))


def main():
    import torch, transformers, trl
    found = []
    for seed in range(SEEDS):
        for who in WHO:
            done = subprocess.run([sys.executable, __file__, who, str(seed)], capture_output=True, text=True, cwd=Path(__file__).parents[1])
            line = next((o for o in done.stdout.splitlines() if o.startswith("RESULT ")), None)
            if line is None: sys.exit(f"{who}: {done.stderr[-2000:]}")
            found.append(json.loads(line[7:]))
            print(found[-1], file=sys.stderr, flush=True)
    print(f"# Training, in real tokens a second\n\ndata/tiny-base with LoRA r = {RANK}, {STEPS} steps of {BATCH} rows, {found[0]['tokens']:,} real tokens of ragged rows (embedded domains, questions made longer), {torch.get_num_threads()} CPU thread(s), {platform.machine()}, "
          f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}; medians of {SEEDS} seed(s), runs alternating. Written by `benchmarks/train.py`.\n")
    print("| | tokens/s, by CPU time | tokens/s, by wall time | held-out NLL, by seed |\n|:--|--:|--:|:--|")
    speed = {}
    for who, name in WHO.items():
        mine = [f for f in found if f["who"] == who]
        speed[who] = [statistics.median(f["tokens"]/f[k] for f in mine) for k in ("cpu", "wall")]
        print(f"| {name} | {speed[who][0]:,.0f} | {speed[who][1]:,.0f} | {', '.join(str(round(f['loss'], 4)) for f in mine)} |")
    for mine, other in (("kit", "trl"), ("kit_unsloth", "unsloth")): print(f"\n{WHO[mine]} against {WHO[other]}: {speed[mine][0]/speed[other][0]:.2f}x by CPU time, {speed[mine][1]/speed[other][1]:.2f}x by wall time.")


if len(sys.argv) == 3: one(sys.argv[1], int(sys.argv[2]))
else: main()
