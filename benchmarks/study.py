"""The shared walk against the naive loop, side by side: python benchmarks/study.py > benchmarks/study.md

A random Llama whose work is in its layers (small vocabulary). Machines stall: of each stretch between two entries or exits of a decoder layer, the fastest of alternating runs counts, and a study's time is the
sum of its stretches. `counted`: the walk's layer calls and heads, made alone in a loop."""

import platform, tempfile, time

import numpy as np, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import finetune_kit.walk as walk
from finetune_kit.importance import drop_one, greedy, truncations
from finetune_kit.scores import scores
from finetune_kit.logs import quiet
from finetune_kit.plan import drop, prune_after
from finetune_kit.surgery import apply_plan

DEPTH, RUNS, ROWS, LENGTH, K = 12, 7, 4, 32, 5
torch.set_num_threads(1)
walk.STACK["cpu"] = ROWS * LENGTH  # one branch a call, so that a stretch is one call, here as there


def stretches(f):
    "Seconds between the entries and exits of decoder layers while `f` runs."
    marks = [time.perf_counter()]

    def mark(module, *args):
        if isinstance(module, LlamaDecoderLayer):
            marks.append(time.perf_counter())

    hooks = [
        torch.nn.modules.module.register_module_forward_pre_hook(mark),
        torch.nn.modules.module.register_module_forward_hook(mark),
    ]
    f()
    for h in hooks:
        h.remove()
    return np.diff([*marks, time.perf_counter()])


def alternate(*fs, runs=RUNS):
    "Seconds of each: the fastest of alternating runs, stretch by stretch, after a first run that does not count."
    for f in fs:
        f()
    taken = [[stretches(f) for f in fs] for _ in range(runs)]
    return [np.min(of_one, 0).sum() for of_one in zip(*taken)]


def counted(model, batch, plans):
    "The counted calls and heads, alone."
    b, calls = walk._Batch(model, batch[0]), walk.layer_calls(plans, DEPTH)["shared"]

    def f():
        with torch.no_grad():
            for n in range(calls):
                b.through(n % DEPTH, [b.start])
            for _ in range(len(plans) + 1):
                walk._row_nll(model, b.start, b, 2**28)

    return f


def main():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=512,
            hidden_size=384,
            intermediate_size=1056,
            num_hidden_layers=DEPTH,
            num_attention_heads=6,
            num_key_value_heads=6,
        )
    ).eval()
    ids = torch.randint(3, 512, (ROWS, LENGTH))
    batch = [dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)]
    ones, firsts = (
        [drop(DEPTH, i) for i in range(DEPTH)],
        [prune_after(DEPTH, n) for n in range(1, DEPTH + 1)],
    )
    print(
        f"# The study engine against the naive loop\n\nRandom Llama, {DEPTH} layers, hidden size 384, {model.num_parameters() / 1e6:.0f}M parameters, fp32; one batch of {ROWS} x {LENGTH} tokens; fastest of {RUNS} alternating runs in one process, stretch by stretch; "
        f"one thread; {platform.machine()}, torch {torch.__version__}. Written by `benchmarks/study.py`.\n\n| study | naive, s | shared, s | faster by | layer calls, naive / shared | counted calls and heads, s | over that |\n|:--|--:|--:|--:|--:|--:|--:|",
        flush=True,
    )
    for name, study, plans in (
        ("drop-one", lambda naive: drop_one(model, batch, naive=naive), ones),
        ("truncations", lambda naive: truncations(model, batch, naive=naive), firsts),
        (f"greedy, k = {K}", lambda naive: greedy(model, batch, K, naive=naive), None),
    ):
        naive, shared, *should = alternate(
            lambda: study(True),
            lambda: study(False),
            *([counted(model, batch, plans)] if plans else []),
        )
        calls = walk.layer_calls(plans, DEPTH) if plans else None
        print(
            f"| {name} | {naive:.2f} | {shared:.2f} | **{naive / shared:.2f}x** | "
            + (
                f"{calls['naive']} / {calls['shared']} = {calls['naive'] / calls['shared']:.2f} | {should[0]:.2f} | {100 * (shared / should[0] - 1):+.0f}% |"
                if plans
                else " |  |  |"
            ),
            flush=True,
        )
    with tempfile.TemporaryDirectory() as d:
        with quiet():
            model.save_pretrained(d)

        def reload():
            for i in range(-1, DEPTH):
                with quiet():
                    one = AutoModelForCausalLM.from_pretrained(d).eval()
                scores(apply_plan(one, drop(DEPTH, None if i < 0 else i)), batch)

        naive, shared = alternate(reload, lambda: drop_one(model, batch), runs=3)
        print(
            f"| drop-one, model loaded anew for each layer | {naive:.2f} | {shared:.2f} | **{naive / shared:.2f}x** |  |  |  |",
            flush=True,
        )


main()
