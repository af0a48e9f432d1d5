"""What only a GPU shows: python benchmarks/gpu.py [llama qwen3] > benchmarks/gpu.md

Random models of about 1B and 2B parameters (SIZE=tiny: small ones, to try the script on a CPU). Three tables for each: training with LoRA and QLoRA, whole and cut, against the settings of unsloth's own notebooks
and against TRL's defaults; the study engine against the naive loop; attention kernels. Each training is a process of its own, since unsloth patches what it touches and peaks of memory never fall; rounds alternate.
Nothing is downloaded. A way that fails is a line of the table that says so."""

import json, os, platform, statistics, subprocess, sys, tempfile, time
from pathlib import Path

TINY = os.environ.get("SIZE") == "tiny"
ROUNDS, STEPS, BATCH, LONGEST, RANK, LR, CUT = (
    int(os.environ.get("ROUNDS", 1 if TINY else 3)),
    4 if TINY else 30,
    8,
    128 if TINY else 1024,
    16,
    2e-4,
    7,
)  # unsloth's notebooks: 2 rows x 4, rank 16, 2e-4
NOTEBOOKS = "unsloth's notebooks"
WAYS = {
    "finetune_kit": dict(backend="transformers"),
    "finetune_kit, loaded by unsloth": dict(backend="unsloth"),
    NOTEBOOKS: dict(backend="unsloth", stock="unsloth"),
    "unsloth's notebooks, packing=True": dict(backend="unsloth", stock="unsloth", packing=True),
    "TRL's defaults": dict(backend="transformers", stock="trl"),
}
SHAPES = dict(
    llama=dict(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
    ),  # as Llama-3.2-1B
    qwen3=dict(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ),
)  # as Qwen3-1.7B
SMALL = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def make(kind, folder):
    "A random model with the embedded base's tokenizer; its rows are random too."
    import shutil, torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
    from finetune_kit.core import ROOT

    of_config, of_model = dict(
        llama=(LlamaConfig, LlamaForCausalLM), qwen3=(Qwen3Config, Qwen3ForCausalLM)
    )[kind]
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = of_model(
            of_config(
                **(SMALL if TINY else SHAPES[kind]),
                tie_word_embeddings=True,
                max_position_embeddings=4096,
            )
        )
    model.to(torch.bfloat16).save_pretrained(folder)
    for f in (ROOT / "data/tiny-base").glob("*token*"):
        shutil.copy(f, folder)


def rows(vocab, n, seed=0):
    "As uneven as GSM8K's: a long tail to the right of some 200 tokens; the first third is the question."
    import numpy as np

    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(5.2 if not TINY else 3.4, 0.45, n), 16, LONGEST).astype(int)
    ids = [rng.integers(10, vocab, length).tolist() for length in lengths]
    return [
        dict(id=str(i), input_ids=one, labels=[-100] * (len(one) // 3) + one[len(one) // 3 :])
        for i, one in enumerate(ids)
    ]


def device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def wait():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stock(model, tokenizer, data, way, tick):
    "What the pages of unsloth and TRL show, nothing turned."
    import datasets, trl, transformers

    class Tick(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            tick()

    usual = (
        dict(
            optim="adamw_8bit" if device() == "cuda" else "adamw_torch",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            weight_decay=0.001,
        )
        if way["stock"] == "unsloth"
        else dict(per_device_train_batch_size=BATCH)
    )

    class Ordered(
        trl.SFTTrainer
    ):  # rows in the order that the kit takes them, so that losses can be compared
        def _get_train_sampler(self, *args):
            return list(range(len(self.train_dataset)))

        if way["stock"] == "trl" and device() == "cpu":
            compute_loss = (
                transformers.Trainer.compute_loss
            )  # TRL's fused head has no path without Triton

    with tempfile.TemporaryDirectory() as d:
        args = trl.SFTConfig(
            output_dir=d,
            max_steps=STEPS,
            learning_rate=LR,
            warmup_steps=5,
            seed=0,
            bf16=device() == "cuda",
            use_cpu=device() == "cpu",
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            max_length=None if not way.get("packing") else LONGEST,
            packing=way.get("packing", False),
            dataset_kwargs=dict(skip_prepare_dataset=not way.get("packing")),
            logging_steps=1,
            **usual,
        )
        columns = [{k: r[k] for k in ("input_ids", "labels")} for r in data]
        return Ordered(
            model=model,
            args=args,
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(columns),
            callbacks=[Tick()],
        ).train()


def training(folder, who, quant, cut):
    "One training; prints its seconds by step, its peak of memory and the held-out loss."
    way, quant = WAYS[who], quant or None
    from finetune_kit.model import add_lora, load_model, load_unsloth

    if way["backend"] == "unsloth":
        load_unsloth()
    import torch
    from finetune_kit.plan import drop
    from finetune_kit.architecture import decoder_layers
    from finetune_kit.surgery import apply_plan
    from finetune_kit.training import TrainConfig, row_order
    from finetune_kit.loop import validation_loss
    from finetune_kit.trainer import train

    model, tokenizer = load_model(folder, quant=quant, backend=way["backend"], max_length=LONGEST)
    if cut:
        model = apply_plan(
            model, drop(len(decoder_layers(model)), min(CUT, len(decoder_layers(model)) - 1))
        )
    vocab, marks = model.config.vocab_size, []
    data, held = rows(vocab, STEPS * BATCH), rows(vocab, 32, seed=1)

    def tick(*_):
        wait()
        marks.append(time.perf_counter())

    cfg = TrainConfig(
        method="qlora" if quant else "lora",
        max_steps=STEPS,
        batch_size=BATCH,
        lr=LR,
        lora_r=RANK,
        lora_alpha=RANK,
        warmup_steps=5,
        eval_every=0,
        save_every=0,
        max_length=LONGEST,
    )
    if "stock" in way:
        order = row_order(len(data), cfg)
        if way["stock"] == "unsloth" and device() == "cuda":
            model = load_unsloth().get_peft_model(
                model,
                r=RANK,
                lora_alpha=RANK,
                lora_dropout=0,
                bias="none",
                target_modules=[
                    "q_proj",
                    "k_proj",
                    "v_proj",
                    "o_proj",
                    "gate_proj",
                    "up_proj",
                    "down_proj",
                ],
                use_gradient_checkpointing="unsloth",
                random_state=0,
            )
        else:
            model = add_lora(model, RANK, RANK)
        stock(model, tokenizer, [data[i] for i in order[: STEPS * BATCH]], way, tick)
    else:
        model = train(model, tokenizer, data, cfg, on_log=tick).model
    peak = torch.cuda.max_memory_allocated() / 2**30 if device() == "cuda" else float("nan")
    print(
        "RESULT",
        json.dumps(
            dict(
                seconds=marks[-1] - marks[0],
                tokens=sum(len(r["input_ids"]) for r in data) * (len(marks) - 1) // STEPS,
                steps=len(marks),
                peak=peak,
                loss=validation_loss(model.eval(), held),
            )
        ),
        flush=True,
    )


def study(folder):
    "The walk against the loop in one process; prints the medians of alternating runs, in seconds, and the peaks."
    import torch
    from finetune_kit.importance import drop_one, greedy, truncations
    from finetune_kit.model import load_model

    model, _ = load_model(folder, backend="transformers")
    ids = torch.randint(10, model.config.vocab_size, (4, LONGEST // 2), device=model.device)
    batch = [dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)]
    for name, f in {
        "drop-one": drop_one,
        "truncations": truncations,
        "greedy, k = 3": lambda model, batch, **how: greedy(model, batch, 3, **how),
    }.items():
        took, tables, peaks = {True: [], False: []}, {}, {}
        for round in range(ROUNDS + 1):  # the first warms up
            for naive in (True, False):
                if device() == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                wait()
                start = time.perf_counter()
                tables[naive] = f(model, batch, naive=naive)
                wait()
                if round:
                    took[naive].append(time.perf_counter() - start)
                if device() == "cuda":
                    peaks[naive] = torch.cuda.max_memory_allocated() / 2**30
        print(
            "RESULT",
            json.dumps(
                dict(
                    study=name,
                    naive=statistics.median(took[True]),
                    shared=statistics.median(took[False]),
                    peaks=[peaks.get(n) for n in (True, False)],
                    apart=float((tables[True].nll - tables[False].nll).abs().max()),
                )
            ),
            flush=True,
        )


def attention(folder, attn):
    "Forward and backward of one batch under a kernel; prints the median of seconds."
    import torch
    from finetune_kit.model import load_model

    model, _ = load_model(folder, backend="transformers", attn=attn)
    ids, took = torch.randint(10, model.config.vocab_size, (4, LONGEST), device=model.device), []
    for _ in range(ROUNDS + 2):
        wait()
        start = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        wait()
        took.append(time.perf_counter() - start)
    print(
        "RESULT",
        json.dumps(
            dict(
                seconds=statistics.median(took[2:]),
                peak=torch.cuda.max_memory_allocated() / 2**30
                if device() == "cuda"
                else float("nan"),
            )
        ),
        flush=True,
    )


def apart(*args):
    "The results that a process of its own printed, or the end of its error."
    done = subprocess.run(
        [sys.executable, __file__, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    found = [
        json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")
    ]
    print(args[0], *args[2:], found or done.stderr[-500:], file=sys.stderr, flush=True)
    return found or (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:160]


def trainings(folder):
    print(
        "\n| base | way | real tokens/s | against unsloth's notebooks | peak GiB | held-out NLL |\n|:--|:--|--:|--:|--:|--:|"
    )
    for quant, cut in (("", 0), ("", 1), ("4bit", 0), ("4bit", 1)):
        found = {who: [] for who in WAYS}
        for _ in range(ROUNDS):
            for who in WAYS:
                found[who].append(apart("train", folder, who, quant, cut))
        base = f"{'QLoRA' if quant else 'LoRA'}, {f'without layer {CUT}' if cut else 'whole'}"
        speed = {
            who: statistics.median(
                f[0]["tokens"] / f[0]["seconds"] for f in runs if isinstance(f, list)
            )
            for who, runs in found.items()
            if any(isinstance(f, list) for f in runs)
        }
        for who, runs in found.items():
            good = [f[0] for f in runs if isinstance(f, list)]
            if not good:
                print(f"| {base} | {who} | failed: {runs[0]} | | | |", flush=True)
            else:
                print(
                    f"| {base} | {who} | {speed[who]:,.0f} | {f'{speed[who] / speed[NOTEBOOKS]:.2f}x' if NOTEBOOKS in speed else ''} | {max(g['peak'] for g in good):.2f} | {good[0]['loss']:.4f} |",
                    flush=True,
                )


def main(kinds):
    import torch, transformers, trl

    name = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    )
    print(
        f"# On a GPU\n\n{name}; torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}. Random bf16 weights; {STEPS} steps of {BATCH} rows of up to {LONGEST} tokens, rank {RANK}; medians of {ROUNDS} alternating round(s), the first step not counted. "
        f"`packing=True` packs more rows into a step, so that its loss is another training's. Written by `benchmarks/gpu.py`."
    )
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            make(kind, folder)
            print(
                f"\n## {kind}: {sum(f.stat().st_size for f in Path(folder).glob('*.safetensors')) / 2**31:.2f}B parameters"
            )
            trainings(folder)
            print(
                "\n| study | naive, s | shared, s | faster by | peak GiB, naive / shared | largest difference of NLL |\n|:--|--:|--:|--:|:--|--:|"
            )
            found = apart("study", folder)
            if isinstance(found, str):
                print(f"| failed: {found} | | | | | |", flush=True)
            else:
                for s in found:
                    print(
                        f"| {s['study']} | {s['naive']:.3f} | {s['shared']:.3f} | **{s['naive'] / s['shared']:.2f}x** | {' / '.join('' if p is None else f'{p:.2f}' for p in s['peaks'])} | {s['apart']:.1g} |",
                        flush=True,
                    )
            print("\n| attention, forward and backward | s | peak GiB |\n|:--|--:|--:|")
            for attn in ("eager", "sdpa", "flash_attention_2"):
                found = apart("attention", folder, attn)
                print(
                    f"| {attn} | {found[0]['seconds']:.3f} | {found[0]['peak']:.2f} |"
                    if isinstance(found, list)
                    else f"| {attn} | failed: {found} | |",
                    flush=True,
                )


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or [""]
    if what == "train":
        training(*rest[:3], int(rest[3]))
    elif what == "study":
        study(*rest)
    elif what == "attention":
        attention(*rest)
    else:
        main(sys.argv[1:] or list(SHAPES))
