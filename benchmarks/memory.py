"""What a training step or a layer study holds at its peak, beside its forecast.

    python benchmarks/memory.py /models/smollm2 [rows] [length] > benchmarks/memory.md

The peak is the kit's own count: the weights, and what `peak_memory` sees beside them.
"""

import gc
import platform
import sys

import torch

from finetune_kit.atlas import atlas
from finetune_kit.importance import drop_one
from finetune_kit.loop import batch_loss
from finetune_kit.lora import add_lora
from finetune_kit.memory import memory_forecast
from finetune_kit.model import load_model
from finetune_kit.speed import peak_memory, weights_bytes

MEM_GIB = 1.0


def make_batch(model, rows, length):
    ids = torch.randint(3, model.config.vocab_size, (rows, length))
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


def training_step(model, batch):
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning)
    (batch_loss(model, batch) / batch["labels"].numel()).backward()
    optimizer.step()


def study(model, batch):
    drop_one(model, [batch], mem_gib=MEM_GIB)
    atlas(model, [batch], mem_gib=MEM_GIB)


def measured_gib(folder, method, rows, length):
    model, _ = load_model(folder, backend="transformers", device="cpu", dtype=torch.float32)
    batch = make_batch(model, rows, length)
    if method == "study":
        call = study
    else:
        call = training_step
        model = (add_lora(model) if method == "lora" else model).train()
    size = peak_memory(lambda: call(model, batch)).size
    return (weights_bytes(model) + size) / 2**30


def main(folder, rows=2, length=64):
    torch.manual_seed(0)
    print("# Memory: forecast and measured\n")
    print(
        f"{folder.rstrip('/').rpartition('/')[2]}, fp32, {rows} rows of {length} tokens; "
        f"{platform.machine()}, torch {torch.__version__}. Written by `benchmarks/memory.py`.\n"
    )
    print("| method | forecast, GiB | measured, GiB | forecast / measured |")
    print("|:--|--:|--:|--:|", flush=True)
    for method in ("lora", "full", "study"):
        dtype = dict(dtype=torch.float32)
        forecast = memory_forecast(folder, rows, length, method, mem_gib=MEM_GIB, **dtype)["total"]
        gc.collect()
        measured = measured_gib(folder, method, rows, length)
        ratio = forecast / measured
        print(f"| {method} | {forecast:.2f} | {measured:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
