"""The shared walk against the naive loop, side by side: python benchmarks/study.py > benchmarks/study.md

A random Llama whose work is in its layers (small vocabulary), medians of alternating runs. `should` is the ratio of counted layer calls."""
import platform, statistics, time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune_kit.importance import drop_one, greedy, layer_calls, truncations
from finetune_kit.surgery import drop, prune_after

DEPTH, RUNS, ROWS, LENGTH, K = 12, 5, 8, 64, 5


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def main():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=DEPTH, num_attention_heads=8, num_key_value_heads=8)).eval()
    ids = torch.randint(3, 512, (ROWS, LENGTH))
    batch = [dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)]
    ones, firsts = [drop(DEPTH, i) for i in range(DEPTH)], [prune_after(DEPTH, n) for n in range(1, DEPTH+1)]
    studies = {"drop-one": (lambda naive: drop_one(model, batch, naive=naive), layer_calls(ones)), "truncations": (lambda naive: truncations(model, batch, naive=naive), layer_calls(firsts)),
               f"greedy, k = {K}": (lambda naive: greedy(model, batch, K, naive=naive), None)}
    print(f"# The study engine against the naive loop\n\nRandom Llama, {DEPTH} layers, hidden size 256, {model.num_parameters()/1e6:.0f}M parameters, fp32; one batch of {ROWS} x {LENGTH} tokens; median of {RUNS} alternating runs in one "
          f"process; {torch.get_num_threads()} thread(s), {platform.machine()}, torch {torch.__version__}. Written by `benchmarks/study.py`.\n\n| study | naive, s | shared, s | faster by | layer calls, naive / shared |\n|:--|--:|--:|--:|--:|")
    for name, (study, calls) in studies.items():
        study(False); study(True)
        times = [(seconds(lambda: study(True)), seconds(lambda: study(False))) for _ in range(RUNS)]
        naive, shared = (statistics.median(t) for t in zip(*times))
        should = f"{calls['naive']} / {calls['shared']} = {calls['naive']/calls['shared']:.2f}" if calls else ""
        print(f"| {name} | {naive:.2f} | {shared:.2f} | **{naive/shared:.2f}x** | {should} |", flush=True)


main()
