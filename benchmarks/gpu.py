"""What only a GPU shows.

    python benchmarks/gpu.py [llama qwen3] > benchmarks/gpu.md

Random models of about 1B and 2B parameters (SIZE=tiny: small ones, to try the script on a CPU).
Three tables for each: training with LoRA and QLoRA, whole and cut, against the settings of
unsloth's own notebooks and against TRL's defaults; the study engine against the naive loop;
attention kernels. Each training is a process of its own, since unsloth patches what it touches and
peaks of memory never fall; rounds alternate. Nothing is downloaded. A way that fails is a line of
the table that says so.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TINY = os.environ.get("SIZE") == "tiny"
ROUNDS = int(os.environ.get("ROUNDS", 1 if TINY else 3))
STEPS = 4 if TINY else 30
LONGEST = 128 if TINY else 1024
BATCH, RANK, LR = 8, 16, 2e-4  # unsloth's notebooks: 2 rows x 4, rank 16, 2e-4
CUT = 7  # the layer that is taken out
NOTEBOOKS = "unsloth's notebooks"
WAYS = {
    "finetune_kit": dict(backend="transformers"),
    "finetune_kit, loaded by unsloth": dict(backend="unsloth"),
    NOTEBOOKS: dict(backend="unsloth", stock="unsloth"),
    "unsloth's notebooks, packing=True": dict(backend="unsloth", stock="unsloth", packing=True),
    "TRL's defaults": dict(backend="transformers", stock="trl"),
}
# As Llama-3.2-1B and Qwen3-1.7B
SHAPES = dict(
    llama=dict(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
    ),
    qwen3=dict(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ),
)
SMALL = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INTRO = """# On a GPU

{name}; torch {torch}, transformers {transformers}, trl {trl}. Random bf16 weights; {steps} steps \
of {batch} rows of up to {longest} tokens, rank {rank}; medians of {rounds} alternating round(s), \
the first step not counted. `packing=True` packs more rows into a step, so that its loss is \
another training's. Written by `benchmarks/gpu.py`."""
TRAININGS = """
| base | way | real tokens/s | against unsloth's notebooks | peak GiB | held-out NLL |
|:--|:--|--:|--:|--:|--:|"""
STUDIES = """
| study | naive, s | shared, s | faster by | peak GiB, naive / shared | largest difference of NLL |
|:--|--:|--:|--:|:--|--:|"""
ATTENTION = """
| attention, forward and backward | s | peak GiB |
|:--|--:|--:|"""


# What the processes share


def has_cuda():
    import torch

    return torch.cuda.is_available()


def wait():
    "Until the GPU is done."
    import torch

    if has_cuda():
        torch.cuda.synchronize()


def now():
    wait()
    return time.perf_counter()


def peak_gib():
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if has_cuda() else float("nan")


def tell(**result):
    "One line for `run_apart`."
    print("RESULT", json.dumps(result), flush=True)


def make_model(kind, folder):
    "A random model with the embedded base's tokenizer."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from finetune_kit.core import ROOT

    classes = dict(llama=(LlamaConfig, LlamaForCausalLM), qwen3=(Qwen3Config, Qwen3ForCausalLM))
    config_class, model_class = classes[kind]
    shape = SMALL if TINY else SHAPES[kind]
    config = config_class(**shape, tie_word_embeddings=True, max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device("cuda" if has_cuda() else "cpu"):
        model = model_class(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in (ROOT / "data/tiny-base").glob("*token*"):
        shutil.copy(file, folder)


def random_rows(vocab, n, seed=0):
    """Rows as uneven as GSM8K's: a long tail to the right of some 200 tokens.

    The first third is the question.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(3.4 if TINY else 5.2, 0.45, n)
    lengths = np.clip(lengths, 16, LONGEST).astype(int)
    encoded = []
    for place, length in enumerate(lengths):
        ids = rng.integers(10, vocab, length).tolist()
        n_asked = len(ids) // 3
        labels = [-100] * n_asked + ids[n_asked:]
        encoded.append(dict(id=str(place), input_ids=ids, labels=labels))
    return encoded


# Training


def ordered_trainer(with_plain_loss):
    "TRL's trainer, with rows in the order that they are given, so that losses can be compared."
    import transformers
    import trl

    class Ordered(trl.SFTTrainer):
        def _get_train_sampler(self, *args):
            return list(range(len(self.train_dataset)))

    if with_plain_loss:  # TRL's fused head has no path without Triton
        Ordered.compute_loss = transformers.Trainer.compute_loss
    return Ordered


def each_step(tick):
    import transformers

    class Tick(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            tick()

    return Tick()


def stock_settings(way, folder):
    "What the pages of unsloth and TRL show, nothing turned."
    import trl

    packing = way.get("packing", False)
    batches = dict(per_device_train_batch_size=BATCH)
    if way["stock"] == "unsloth":
        batches = dict(
            optim="adamw_8bit" if has_cuda() else "adamw_torch",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            weight_decay=0.001,
        )
    return trl.SFTConfig(
        output_dir=folder,
        max_steps=STEPS,
        learning_rate=LR,
        warmup_steps=5,
        seed=0,
        bf16=has_cuda(),
        use_cpu=not has_cuda(),
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_length=LONGEST if packing else None,
        packing=packing,
        dataset_kwargs=dict(skip_prepare_dataset=not packing),
        logging_steps=1,
        **batches,
    )


def adapted(model, way):
    "The model with adapters, as unsloth's notebooks make them where that is asked."
    from finetune_kit.lora import add_lora
    from finetune_kit.model import load_unsloth

    if way["stock"] != "unsloth" or not has_cuda():
        return add_lora(model, RANK, RANK)
    return load_unsloth().get_peft_model(
        model,
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0,
        bias="none",
        target_modules=PROJECTIONS,
        use_gradient_checkpointing="unsloth",
        random_state=0,
    )


def train_stock(model, tokenizer, rows, way, tick):
    "The trained model; rows in the order that they are given."
    import datasets

    model = adapted(model, way)
    trainer = ordered_trainer(with_plain_loss=way["stock"] == "trl" and not has_cuda())
    columns = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        trainer(
            model=model,
            args=stock_settings(way, folder),
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(columns),
            callbacks=[each_step(tick)],
        ).train()
    return model


def load_base(folder, way, quant, is_cut):
    "The model, perhaps without a layer, and its tokenizer."
    from finetune_kit.model import load_model, load_unsloth

    if way["backend"] == "unsloth":
        load_unsloth()  # before anything of transformers
    from finetune_kit.model import n_layers
    from finetune_kit.plan import drop
    from finetune_kit.surgery import apply_plan

    model, tokenizer = load_model(folder, quant=quant, backend=way["backend"], max_length=LONGEST)
    if is_cut:
        depth = n_layers(model)
        model = apply_plan(model, drop(depth, min(CUT, depth - 1)))
    return model, tokenizer


def kit_config(quant):
    from finetune_kit.training import TrainConfig

    return TrainConfig(
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


def train_once(folder, who, quant, is_cut):
    "Tells the seconds of all steps but the first, the peak of memory and the held-out loss."
    way, quant, marks = WAYS[who], quant or None, []
    model, tokenizer = load_base(folder, way, quant, is_cut)
    from finetune_kit.loop import row_order, validation_loss
    from finetune_kit.trainer import train

    vocab, cfg = model.config.vocab_size, kit_config(quant)
    rows, held_out = random_rows(vocab, STEPS * BATCH), random_rows(vocab, 32, seed=1)

    def tick(*_):
        marks.append(now())

    if "stock" in way:
        ordered = [rows[place] for place in row_order(len(rows), cfg)]
        model = train_stock(model, tokenizer, ordered, way, tick)
    else:
        model = train(model, tokenizer, rows, cfg, on_log=tick).model
    n_tokens = sum(len(row["input_ids"]) for row in rows)
    tell(
        seconds=marks[-1] - marks[0],
        tokens=n_tokens * (len(marks) - 1) // STEPS,
        steps=len(marks),
        peak=peak_gib(),
        loss=validation_loss(model.eval(), held_out),
    )


# Studies and attention


def time_study(study, model, batch, naive):
    "Its table, its seconds and its peak of memory."
    import torch

    if has_cuda():
        torch.cuda.reset_peak_memory_stats()
    start = now()
    table = study(model, batch, naive=naive)
    return table, now() - start, peak_gib()


def compare_study(name, study, model, batch):
    "Tells the medians of alternating runs, in seconds, and the peaks."
    took, tables, peaks = {True: [], False: []}, {}, {}
    for _ in range(ROUNDS + 1):
        for naive in (True, False):
            tables[naive], seconds, peaks[naive] = time_study(study, model, batch, naive)
            took[naive].append(seconds)
    naive_s, shared_s = (statistics.median(took[naive][1:]) for naive in (True, False))  # 1: warm
    difference = (tables[True].nll - tables[False].nll).abs().max()
    tell(
        study=name,
        naive=naive_s,
        shared=shared_s,
        peaks=[peaks[True], peaks[False]],
        apart=float(difference),
    )


def study_once(folder):
    "The walk against the loop in one process."
    import torch

    from finetune_kit.importance import drop_one, greedy, truncations
    from finetune_kit.model import load_model

    def greedy_3(model, batch, naive):
        return greedy(model, batch, 3, naive=naive)

    model, _ = load_model(folder, backend="transformers")
    ids = torch.randint(10, model.config.vocab_size, (4, LONGEST // 2), device=model.device)
    batch = [dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)]
    studies = {"drop-one": drop_one, "truncations": truncations, "greedy, k = 3": greedy_3}
    for name, study in studies.items():
        compare_study(name, study, model, batch)


def attend(folder, attn):
    "Forward and backward of one batch under a kernel; tells the median of seconds."
    import torch

    from finetune_kit.model import load_model

    model, _ = load_model(folder, backend="transformers", attn=attn)
    ids = torch.randint(10, model.config.vocab_size, (4, LONGEST), device=model.device)
    took = []
    for _ in range(ROUNDS + 2):
        start = now()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        took.append(now() - start)
    tell(seconds=statistics.median(took[2:]), peak=peak_gib())


# The report


def run_apart(*args):
    "The results that a process of its own told, or the end of its error."
    command = [sys.executable, __file__, *map(str, args)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    print(args[0], *args[2:], results or done.stderr[-500:], file=sys.stderr, flush=True)
    if results:
        return results
    errors = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return errors[-1][:160]


def print_row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def measured(runs):
    "The results among them; the others are errors."
    return [run[0] for run in runs if isinstance(run, list)]


def speed(results):
    return statistics.median(result["tokens"] / result["seconds"] for result in results)


def report_base(folder, quant, is_cut):
    "A line of each way to train this base."
    runs = {who: [] for who in WAYS}
    for _ in range(ROUNDS):
        for who in WAYS:
            runs[who].append(run_apart("train", folder, who, quant, is_cut))
    cut = f"without layer {CUT}" if is_cut else "whole"
    base = f"{'QLoRA' if quant else 'LoRA'}, {cut}"
    usual = measured(runs[NOTEBOOKS])
    for who in WAYS:
        good = measured(runs[who])
        if not good:
            print_row(base, who, f"failed: {runs[who][0]}", "", "", "")
            continue
        factor = f"{speed(good) / speed(usual):.2f}x" if usual else ""
        peak, loss = max(result["peak"] for result in good), good[0]["loss"]
        print_row(base, who, f"{speed(good):,.0f}", factor, f"{peak:.2f}", f"{loss:.4f}")


def report_studies(folder):
    results = run_apart("study", folder)
    if isinstance(results, str):
        print_row(f"failed: {results}", "", "", "", "", "")
        return
    for result in results:
        naive, shared = result["naive"], result["shared"]
        peaks = [f"{peak:.2f}" for peak in result["peaks"]]
        print_row(
            result["study"],
            f"{naive:.3f}",
            f"{shared:.3f}",
            f"**{naive / shared:.2f}x**",
            " / ".join(peaks),
            f"{result['apart']:.1g}",
        )


def report_attention(folder):
    for attn in ("eager", "sdpa", "flash_attention_2"):
        results = run_apart("attention", folder, attn)
        if isinstance(results, str):
            print_row(attn, f"failed: {results}", "")
        else:
            print_row(attn, f"{results[0]['seconds']:.3f}", f"{results[0]['peak']:.2f}")


def report_model(kind, folder):
    make_model(kind, folder)
    n_bytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    print(f"\n## {kind}: {n_bytes / 2**31:.2f}B parameters")
    print(TRAININGS)
    for quant in ("", "4bit"):
        for is_cut in (0, 1):
            report_base(folder, quant, is_cut)
    print(STUDIES)
    report_studies(folder)
    print(ATTENTION)
    report_attention(folder)


def print_intro():
    import torch
    import transformers
    import trl

    name = torch.cuda.get_device_name() if has_cuda() else f"CPU, {platform.machine()}"
    intro = INTRO.format(
        name=name,
        torch=torch.__version__,
        transformers=transformers.__version__,
        trl=trl.__version__,
        steps=STEPS,
        batch=BATCH,
        longest=LONGEST,
        rank=RANK,
        rounds=ROUNDS,
    )
    print(intro)


def main(kinds):
    print_intro()
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            report_model(kind, folder)


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or [""]
    if what == "train":
        train_once(*rest[:3], int(rest[3]))
    elif what == "study":
        study_once(*rest)
    elif what == "attention":
        attend(*rest)
    else:
        main(sys.argv[1:] or list(SHAPES))
