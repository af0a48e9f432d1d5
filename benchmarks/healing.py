"""Ways to heal one cut of data/tiny-base, at equal steps and at equal time.

    OMP_NUM_THREADS=1 python benchmarks/healing.py

Same cut, rows in the same order, batch and learning rate rule; held-out loss and exact match on
the same items. Time is this process's CPU time, with the pass of a teacher and the answers of the
base in it; at equal time each way makes as many steps as fit into what SFT took. Writes
benchmarks/healing.md. STEPS, ITEMS, DROP and SEEDS change the setting.
"""

import os
import platform
import sys
import time
from pathlib import Path

import pandas as pd

STEPS = int(os.environ.get("STEPS", 100))
ITEMS = int(os.environ.get("ITEMS", 120))
DROP = os.environ.get("DROP", "6,7")
SEEDS = int(os.environ.get("SEEDS", 1))
BATCH, LONGEST_ANSWER = 8, 24
BASE = "data/tiny-base"
WAYS = {
    "SFT": {},
    "distillation": dict(heal="distill"),
    "SFT + distillation": dict(heal="sft+distill"),
    "distillation from the control": dict(heal="distill", teacher="control"),
    "SFT on the base's answers": dict(own=True),
    "last 3 layers, SFT": dict(method="last_layers"),
    "last 3 layers, distillation": dict(method="last_layers", heal="distill"),
}
INTRO = """# Ways to heal

data/tiny-base without layers {drop}, {steps} steps of {batch} rows of data/domains, LoRA r = 16 \
where nothing else is said, lr by the kit's rule, {seeds} seed(s); {items} held-out items; \
{threads} CPU thread(s), {machine}, torch {torch}. NLL in nats per scored token with the data's \
references; "back" is the share of the way from the cut model to the control, in NLL. Time is CPU \
time of the training, the teacher's passes and the base's answers included. Written by \
`benchmarks/healing.py`.

Before healing: {before}.
"""


class Bench:
    "The data, the models, and what was measured."

    def __init__(self, seed):
        from finetune_kit.chat import encode_rows
        from finetune_kit.data import prepare_dataset

        self.seed = seed
        _, self.tokenizer = self.load()
        self.rows = prepare_dataset("data/domains")
        self.encoded = {name: encode_rows(rows, self.tokenizer) for name, rows in self.rows.items()}
        held_out = sorted(self.encoded["test"], key=lambda row: row["id"])
        self.held_out = held_out[:: max(1, len(held_out) // ITEMS)][:ITEMS]
        self.control = None

    def load(self, drop=None):
        from finetune_kit.model import load_model
        from finetune_kit.plan import drop as plan_of
        from finetune_kit.surgery import apply_plan

        model, tokenizer = load_model(BASE, backend="transformers", device="cpu")
        return apply_plan(model, plan_of(model, drop)), tokenizer

    def measure(self, model):
        from finetune_kit.evaluation import evaluate_model

        items = evaluate_model(model, self.tokenizer, self.held_out, max_new_tokens=LONGEST_ANSWER)
        nll = items.nll.sum() / items.n_tokens.sum()
        return dict(nll=nll, exact_match=items.exact_match.mean())

    def answers(self, steps):
        "The base's own answers to as many rows as the steps see, and the rows they leave."
        from finetune_kit.chat import encode_rows
        from finetune_kit.rows import Rows
        from finetune_kit.targets import own_answers

        rows = Rows([row["row"] for row in self.encoded["train"]][: steps * BATCH])
        base = self.load()[0]
        key = [BASE, time.time()]  # nothing is kept: the time of the answers belongs to it
        own = own_answers(lambda: base, key, self.tokenizer, rows, max_new_tokens=LONGEST_ANSWER)
        own.file.unlink()
        return encode_rows(own.rows, self.tokenizer)

    def heal(self, steps, drop=DROP, own=False, **changes):
        "Train, measure, and say what it took."
        from finetune_kit.trainer import train
        from finetune_kit.training import TrainConfig

        cfg = TrainConfig(
            max_steps=steps, batch_size=BATCH, eval_every=0, seed=self.seed, **changes
        )
        model, tokenizer = self.load(drop)
        start = time.process_time()
        rows = self.answers(steps) if own else self.encoded["train"]
        teacher = None
        if cfg.heal != "sft":
            teacher = self.control if cfg.teacher == "control" else self.load()[0]
        result = train(model, tokenizer, rows, cfg, teacher=teacher)
        seconds = time.process_time() - start
        return result.model, dict(steps=steps, seconds=seconds) | self.measure(result.model)


def run(seed):
    "A line for each way, at equal steps and at equal time; and the states without healing."
    bench = Bench(seed)
    states = dict(base=bench.measure(bench.load()[0]), cut=bench.measure(bench.load(DROP)[0]))
    bench.control, states["control"] = bench.heal(STEPS, drop=None)
    lines = []
    for way, changes in WAYS.items():
        _, line = bench.heal(STEPS, **changes)
        lines.append(dict(way=way, at="equal steps") | line)
        print(lines[-1], file=sys.stderr)
    seconds = lines[0]["seconds"]
    for way, changes in WAYS.items():
        took = next(line for line in lines if line["way"] == way)
        steps = max(12, round(STEPS * seconds / took["seconds"]))
        _, line = bench.heal(steps, **changes)
        lines.append(dict(way=way, at="equal time") | line)
        print(lines[-1], file=sys.stderr)
    return pd.DataFrame(lines), pd.DataFrame(states).T


def table(lines, states):
    "Markdown: a row a way."
    lost = states.nll["cut"] - states.nll["control"]
    heads = ["", *["steps", "CPU s", "NLL", "back", "exact match"] * 2]
    text = [
        "| | at equal steps | | | | | at equal time | | | | |",
        "|:--|" + "--:|" * 10,
        "| " + " | ".join(heads) + " |",
    ]
    for way in WAYS:
        cells = [way]
        for at in ("equal steps", "equal time"):
            it = lines[(lines.way == way) & (lines["at"] == at)].mean(numeric_only=True)
            cells += [f"{it.steps:.0f}", f"{it.seconds:.0f}", f"{it.nll:.3f}"]
            cells += [f"{(states.nll['cut'] - it.nll) / lost:.0%}", f"{it.exact_match:.0%}"]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def main():
    import torch

    results = [run(seed) for seed in range(SEEDS)]
    lines = pd.concat([lines for lines, _ in results])
    states = sum(states for _, states in results) / SEEDS
    told = [f"{name} {it.nll:.3f} ({it.exact_match:.0%})" for name, it in states.iterrows()]
    intro = INTRO.format(
        drop=DROP,
        steps=STEPS,
        batch=BATCH,
        seeds=SEEDS,
        items=ITEMS,
        threads=torch.get_num_threads(),
        machine=platform.machine(),
        torch=torch.__version__,
        before="NLL (exact match) " + ", ".join(told),
    )
    text = f"{intro}\n{table(lines, states)}\n"
    (Path(__file__).parent / "healing.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
