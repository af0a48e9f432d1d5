"""
A model larger than memory, studied: python benchmarks/stream.py [FOLDER] > benchmarks/stream.md

Writes a random Llama of more than 4 GiB (bf16, one shard a layer) to FOLDER, once. Then a process
of its own takes a whole drop-one study of it, with its layers read from disk, and the peak of that
process's resident memory is measured.
"""

import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune_kit.importance import drop_one
from finetune_kit.model import remembered
from finetune_kit.plan import drop
from finetune_kit.stream import stream_model
from finetune_kit.study import forecast

DEPTH = 42
VOCABULARY = 8192
ROWS = 4
BATCH_SIZE = 2
LENGTH = 4  # tokens of a row
MEM_GIB = 0.25
INDEX = "model.safetensors.index.json"


@dataclass
class Measured:
    "What the study's process prints, as JSON."

    seconds: float
    forecast: dict
    loads: int  # layers read from disk
    peak_gib: float
    baseline: float  # NLL of the whole model
    least: float  # smallest change without a layer
    most: float
    layers: int
    threads: int
    torch: str


def config():
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=DEPTH,
        num_attention_heads=16,
        num_key_value_heads=16,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def random_weight(shape):
    "Ones for a norm, small random numbers for a matrix."
    values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.02
    return values.bfloat16()


def shard_of(name):
    "The number of the layer that a weight is in; rest: of no layer."
    return name.split(".")[2] if ".layers." in name else "rest"


def write(folder):
    "One shard a layer, so that no more than a layer is ever in memory."
    config().save_pretrained(folder)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config())
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(shard_of(name), []).append(name)
    weight_map = {}
    for shard, names in shards.items():
        torch.manual_seed(DEPTH if shard == "rest" else int(shard))
        file = f"model-{shard}.safetensors"
        tensors = {name: random_weight(shapes[name]) for name in names}
        save_file(tensors, folder / file, metadata=dict(format="pt"))
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps(dict(weight_map=weight_map)))


def random_batches():
    torch.manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH))
    return [
        dict(input_ids=rows, attention_mask=torch.ones_like(rows), labels=rows)
        for rows in ids.split(BATCH_SIZE)
    ]


def count_loads(disk):
    "A list that grows by each layer that is read."
    loads = []
    load = disk.load

    def counted_load(layer):
        loads.append(layer)
        load(layer)

    disk.load = counted_load
    return loads


def study(folder):
    batches = random_batches()
    model = stream_model(folder, dtype=torch.float32)
    loads = count_loads(remembered(model).disk)
    plans = [drop(DEPTH, layer) for layer in range(DEPTH)]
    cost = forecast(model, batches, plans, mem_gib=MEM_GIB)
    loads.clear()
    start = time.perf_counter()
    table = drop_one(model, batches, mem_gib=MEM_GIB)
    return Measured(
        seconds=time.perf_counter() - start,
        forecast=cost,
        loads=len(loads),
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        baseline=table.attrs["baseline"],
        least=float(table.delta.min()),
        most=float(table.delta.max()),
        layers=len(table),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def report(measured, size_gib):
    shared = measured.forecast["shared"]
    naive = measured.forecast["naive"]
    shape = config()
    rows = [
        ("peak resident memory of the process", f"**{measured.peak_gib:.2f} GiB**"),
        (
            f"layers read from disk, for {DEPTH} layers",
            f"{measured.loads} (one more asks what layers return)",
        ),
        (
            "layer calls, both batches: walk / naive loop",
            f"{shared['layer_calls']} / {naive['layer_calls']}",
        ),
        (
            "weights read, walk / naive loop by forecast",
            f"{shared['weights_gib']:.1f} / {naive['weights_gib']:.0f} GiB",
        ),
        ("seconds, measured / forecast", f"{measured.seconds:.0f} / {shared['seconds']:.0f}"),
        (
            "NLL of the whole model; smallest and largest change without a layer",
            f"{measured.baseline:.4f}; {measured.least:+.4f}, {measured.most:+.4f}",
        ),
    ]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    return f"""# A model larger than memory

A random Llama, {DEPTH} layers, hidden size {shape.hidden_size}, {size_gib:.2f} GiB of bf16 \
safetensors on disk, computed in fp32; drop-one of all {measured.layers} layers on \
{ROWS // BATCH_SIZE} batches of {BATCH_SIZE} x {LENGTH} tokens, `mem_gib={MEM_GIB}`;
{measured.threads} thread(s), {platform.machine()}, torch {measured.torch}. \
Written by `benchmarks/stream.py`.

| | |
|:--|--:|
{table}"""


def run_step(step, folder):
    "A step in a process of its own; what it prints last."
    command = [sys.executable, __file__, step, str(folder)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return result.stdout.splitlines()[-1] if result.stdout else ""


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / INDEX).exists():
        run_step("--write", folder)
    size_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    measured = Measured(**json.loads(run_step("--study", folder)))
    print(report(measured, size_bytes / 2**30))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--study"]:
        print(json.dumps(asdict(study(Path(sys.argv[2])))))
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
