"""The shared walk against the naive loop, side by side.

    python benchmarks/study.py > benchmarks/study.md

A random Llama whose work is in its layers (small vocabulary). Machines stall: of each stretch
between two entries or exits of a decoder layer, the fastest of alternating runs counts, and a
study's time is the sum of its stretches. "Counted": the walk's layer calls and heads, made alone in
a loop.
"""

import platform
import tempfile
import time
from functools import partial

import numpy as np
import torch
from torch.nn.modules import module as every_module
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from finetune_kit.cuts import layer_calls
from finetune_kit.importance import drop_one, greedy, truncations
from finetune_kit.logs import quiet
from finetune_kit.plan import drop, prune_after
from finetune_kit.scores import scores
from finetune_kit.surgery import apply_plan
from finetune_kit.walk import TOKENS_AT_ONCE, TracedBatch, row_nll

DEPTH, RUNS, ROWS, LENGTH, K = 12, 7, 4, 32, 5
SHAPE = dict(
    vocab_size=512,
    hidden_size=384,
    intermediate_size=1056,
    num_hidden_layers=DEPTH,
    num_attention_heads=6,
    num_key_value_heads=6,
)
INTRO = """# The study engine against the naive loop

Random Llama, {depth} layers, hidden size {hidden}, {millions:.0f}M parameters, fp32; one batch of \
{rows} x {length} tokens; fastest of {runs} alternating runs in one process, stretch by stretch; \
one thread; {machine}, torch {torch}. Written by `benchmarks/study.py`.
"""
COLUMNS = (
    "study",
    "naive, s",
    "shared, s",
    "faster by",
    "layer calls, naive / shared",
    "counted calls and heads, s",
    "over that",
)


def stretches(study):
    "Seconds between the entries and exits of decoder layers while `study` runs."
    marks = [time.perf_counter()]

    def mark(module, *args):
        if isinstance(module, LlamaDecoderLayer):
            marks.append(time.perf_counter())

    hooks = [
        every_module.register_module_forward_pre_hook(mark),
        every_module.register_module_forward_hook(mark),
    ]
    study()
    for hook in hooks:
        hook.remove()
    return np.diff([*marks, time.perf_counter()])


def alternate(*studies, runs=RUNS):
    """Seconds of each: the fastest of alternating runs, stretch by stretch.

    A first run of each does not count.
    """
    for study in studies:
        study()
    rounds = [[stretches(study) for study in studies] for _ in range(runs)]
    return [np.min(of_one, 0).sum() for of_one in zip(*rounds, strict=True)]


def make_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval()


def make_batch():
    ids = torch.randint(3, SHAPE["vocab_size"], (ROWS, LENGTH))
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


@torch.no_grad()
def make_counted_calls(model, batch, plans):
    "The calls and heads that the walk is said to make, alone."
    traced = TracedBatch(model, batch)
    for call in range(layer_calls(plans, DEPTH).shared):
        traced.through(call % DEPTH, [traced.start])
    for _ in range(len(plans) + 1):
        row_nll(model, traced.start, traced, 2**28)


def reload_loop(folder, batch):
    "Load the model anew for the whole and for each layer."
    for layer in (None, *range(DEPTH)):
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
        scores(apply_plan(model, drop(DEPTH, layer)), [batch])


def print_row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def compare(name, study, plans, model, batch):
    "A line of the table; `plans`: what the study tries, where that is known before."
    contenders = [partial(study, naive=True), partial(study, naive=False)]
    if plans:
        contenders.append(partial(make_counted_calls, model, batch, plans))
    naive, shared, *counted = alternate(*contenders)
    about_calls = ["", "", ""]
    if plans:
        calls, [alone] = layer_calls(plans, DEPTH), counted
        about_calls = [
            f"{calls.naive} / {calls.shared} = {calls.naive / calls.shared:.2f}",
            f"{alone:.2f}",
            f"{shared / alone - 1:+.0%}",
        ]
    print_row(name, f"{naive:.2f}", f"{shared:.2f}", f"**{naive / shared:.2f}x**", *about_calls)


def compare_with_reloading(model, batch):
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            model.save_pretrained(folder)
        ours = partial(drop_one, model, [batch])
        naive, shared = alternate(partial(reload_loop, folder, batch), ours, runs=3)
    name, factor = "drop-one, model loaded anew for each layer", f"**{naive / shared:.2f}x**"
    print_row(name, f"{naive:.2f}", f"{shared:.2f}", factor, "", "", "")


def print_head(model):
    intro = INTRO.format(
        depth=DEPTH,
        hidden=SHAPE["hidden_size"],
        millions=model.num_parameters() / 1e6,
        rows=ROWS,
        length=LENGTH,
        runs=RUNS,
        machine=platform.machine(),
        torch=torch.__version__,
    )
    print(intro)
    print_row(*COLUMNS)
    print(f"|:--{'|--:' * (len(COLUMNS) - 1)}|", flush=True)


def main():
    torch.set_num_threads(1)
    # One branch a call, so that a stretch is one call, here as there
    TOKENS_AT_ONCE["cpu"] = ROWS * LENGTH
    model = make_model()
    batch = make_batch()
    print_head(model)
    ones = [drop(DEPTH, layer) for layer in range(DEPTH)]
    firsts = [prune_after(DEPTH, n) for n in range(1, DEPTH + 1)]
    studies = {
        "drop-one": (partial(drop_one, model, [batch]), ones),
        "truncations": (partial(truncations, model, [batch]), firsts),
        f"greedy, k = {K}": (partial(greedy, model, [batch], K), None),
    }
    for name, (study, plans) in studies.items():
        compare(name, study, plans, model, batch)
    compare_with_reloading(model, batch)


if __name__ == "__main__":
    main()
