"""What a cut buys in speed and memory, by the number of layers that are left.

python benchmarks/gains.py models/smollm2.gguf > benchmarks/gains.md
"""

import sys

import pandas as pd
import torch

from finetune_kit.gains import Load, gains, gains_table
from finetune_kit.model import load_model, n_layers
from finetune_kit.plan import drop

LOADS = [Load(1, 64), Load(8, 64), Load(1, 512)]
SHARES = 1 / 30, 0.1, 0.2, 0.4, 0.6  # Of the layers, taken out from the end


def measure(model) -> pd.DataFrame:
    "Each cut against the whole model, in turns."
    depth = n_layers(model)
    tables = []
    for share in SHARES:
        n_out = max(1, round(share * depth))
        times = gains(model, drop(depth, f"{depth - n_out}-{depth - 1}"), float("inf"), LOADS)
        memory = times.attrs["memory"]
        weights = memory["cut"]["weights_mib"] / memory["whole"]["weights_mib"]
        tables.append(gains_table(times).assign(layers_out=n_out, weights=weights))
    return pd.concat(tables)


def main(source: str):
    "Print a table in Markdown."
    model, _ = load_model(source, backend="transformers")
    table = measure(model)
    lines = []
    for row in table.itertuples():
        ratio = f"{row.cut_over_whole:.2f}"
        if row.what != "cache_mib":
            ratio += f" ({row.cut_over_whole_lo:.2f} to {row.cut_over_whole_hi:.2f})"
        lines.append(
            {
                "layers out": row.layers_out,
                "weights": f"{row.weights:.2f}",
                "prompts": f"{row.batch_size} of {row.length}",
                "what": row.what,
                "whole": f"{row.whole:.4g}",
                "cut / whole": ratio,
            }
        )
    device = f"{model.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print("# What a cut buys\n")
    print(
        f"`python benchmarks/gains.py {source}`: {n_layers(model)} layers, {model.dtype}; {device}."
    )
    print("Layers are taken out from the end. Whole and cut model answer in turns, five rounds;")
    print("the median is told, and of the ratio the lowest and the highest round.\n")
    print(pd.DataFrame(lines).to_markdown(index=False))


if __name__ == "__main__":
    main(sys.argv[1])
