"""A model larger than memory, studied: python benchmarks/stream.py [FOLDER] > benchmarks/stream.md

Writes a random Llama of more than 4 GiB (bf16, one shard a layer) to FOLDER, once, and takes a whole drop-one study of it with its layers read from disk, in a process of its own whose peak resident memory is measured."""

import json, platform, resource, subprocess, sys, tempfile, time
from pathlib import Path

DEPTH, HIDDEN, INNER, VOCAB, ROWS, LENGTH = 42, 2048, 5632, 8192, 4, 4


def config():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=DEPTH,
        num_attention_heads=16,
        num_key_value_heads=16,
    )


def write(folder):
    "One shard a layer, so that no more than a layer is ever in memory."
    import torch
    from safetensors.torch import save_file
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    cfg = config()
    cfg.architectures, cfg.dtype = ["LlamaForCausalLM"], "bfloat16"
    cfg.save_pretrained(folder)
    with init_empty_weights():
        names = {n: p.shape for n, p in AutoModelForCausalLM.from_config(cfg).named_parameters()}
    where, shards = {}, {}
    for n in names:
        shards.setdefault(n.split(".")[2] if ".layers." in n else "rest", []).append(n)
    for shard, some in shards.items():
        torch.manual_seed(DEPTH if shard == "rest" else int(shard))
        save_file(
            {
                n: (
                    torch.ones(names[n]) if len(names[n]) == 1 else torch.randn(names[n]) * 0.02
                ).bfloat16()
                for n in some
            },
            folder / f"model-{shard}.safetensors",
            metadata=dict(format="pt"),
        )
        where |= {n: f"model-{shard}.safetensors" for n in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=where)))


def study(folder):
    import torch
    from finetune_kit.importance import drop_one
    from finetune_kit.plan import drop
    from finetune_kit.stream import stream_model
    from finetune_kit.study import forecast

    torch.manual_seed(0)
    ids = torch.randint(3, VOCAB, (ROWS, LENGTH))
    batches = [
        dict(
            input_ids=ids[i : i + 2],
            attention_mask=torch.ones_like(ids[i : i + 2]),
            labels=ids[i : i + 2],
        )
        for i in (0, 2)
    ]
    model = stream_model(folder, dtype=torch.float32)
    loads, load = [], remembered(model).disk.load
    remembered(model).disk.load = lambda i: (loads.append(i), load(i))
    cost = forecast(model, batches, [drop(DEPTH, i) for i in range(DEPTH)], mem_gib=0.25)
    del loads[:]
    start = time.perf_counter()
    table = drop_one(model, batches, mem_gib=0.25)
    print(
        json.dumps(
            dict(
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
        )
    )


def main(folder):
    if not (folder / "model.safetensors.index.json").exists():
        subprocess.run([sys.executable, __file__, "--write", str(folder)], check=True)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 2**30
    done = json.loads(
        subprocess.run(
            [sys.executable, __file__, "--study", str(folder)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()[-1]
    )
    cost = done["forecast"]
    print(f"""# A model larger than memory

A random Llama, {DEPTH} layers, hidden size {HIDDEN}, {size:.2f} GiB of bf16 safetensors on disk, computed in fp32; drop-one of all {done["layers"]} layers on 2 batches of {ROWS // 2} x {LENGTH} tokens, `mem_gib=0.25`;
{done["threads"]} thread(s), {platform.machine()}, torch {done["torch"]}. Written by `benchmarks/stream.py`.

| | |
|:--|--:|
| peak resident memory of the process | **{done["peak_gib"]:.2f} GiB** |
| layers read from disk, for {DEPTH} layers | {done["loads"]} (one more asks what layers return) |
| layer calls, both batches: walk / naive loop | {cost["shared"]["layer_calls"]} / {cost["naive"]["layer_calls"]} |
| weights read, walk / naive loop by forecast | {cost["shared"]["weights_gib"]:.1f} / {cost["naive"]["weights_gib"]:.0f} GiB |
| seconds, measured / forecast | {done["seconds"]:.0f} / {cost["shared"]["seconds"]:.0f} |
| NLL of the whole model; smallest and largest change without a layer | {done["baseline"]:.4f}; {done["least"]:+.4f}, {done["most"]:+.4f} |""")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--study"]:
        study(Path(sys.argv[2]))
    else:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
        folder.mkdir(parents=True, exist_ok=True)
        main(folder)
