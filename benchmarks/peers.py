"""Other tools' layer importance against ours, on the same weights and tokens, in one process.

    python benchmarks/peers.py --peers FOLDER_OF_CLONES > benchmarks/peers.md

FOLDER_OF_CLONES holds git clones named short-transformers, SLEB, shortened-llm, ShortGPT and
PruneMe; one that is absent is skipped. Their own code runs; what today's libraries or a machine
without a GPU break is mended from outside, in `peer_code.py`, which says how. Nothing is fetched.
"""

import argparse
import copy
import functools
import json
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from peer_code import (
    MetaLlama,
    bring,
    pruneme,
    quietly,
    reload_loop,
    short_transformers,
    shortened_llm,
    shortgpt,
    sleb,
)
from scipy.stats import spearmanr
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from finetune_kit.architecture import decoder_layers
from finetune_kit.importance import drop_one, greedy
from finetune_kit.model import load_model, n_layers
from finetune_kit.plan import drop
from finetune_kit.rows import load_rows
from finetune_kit.surgery import skipping

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared/real"
RUNS = 3


# ---- the same weights and tokens for everyone


@dataclass
class Case:
    """A model and texts that all have at least `length` tokens.

    So the rows are equally long, and every tool sees the same tokens.
    """

    path: Path
    model: object
    tokenizer: object
    texts: list
    length: int
    k: int  # layers that greedy removes; size of the block for angular distance

    def tokens(self, text):
        options = dict(return_tensors="pt", truncation=True, max_length=self.length)
        return self.tokenizer(text, **options).input_ids

    @functools.cached_property
    def ids(self):
        return torch.cat([self.tokens(text) for text in self.texts])

    @property
    def batch(self):
        "All rows as one batch."
        return [as_batch(self.ids)]

    @property
    def single(self):
        "One row a batch."
        return [as_batch(row[None]) for row in self.ids]

    @property
    def depth(self):
        return n_layers(self.model)


def as_batch(ids):
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


def load_base(path):
    return load_model(path, backend="transformers", device="cpu")


def make_case(path, pieces, n_rows, length, k):
    "Pieces are joined until they are long enough."
    model, tokenizer = load_base(path)
    texts, text = [], ""
    for piece in pieces:
        text = f"{text} {piece}".strip()
        if len(tokenizer(text).input_ids) >= length:
            texts.append(text)
            text = ""
        if len(texts) == n_rows:
            break
    return Case(path, model, tokenizer, texts, length, k)


def first_said(row, role):
    return next(turn["content"] for turn in row["messages"] if turn["role"] == role)


def question_text(row):
    "As in the documents that tiny-base was trained on."
    return f"Question: {first_said(row, 'user')} Answer: {first_said(row, 'assistant')}"


# ---- what is exact: states by plain hooks, before the final norm


@torch.no_grad()
def states(model, batch):
    "What enters each layer, and what leaves the last: layers + 1 tensors (batch, seq, hidden)."
    layers, found = decoder_layers(model), []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        for layer in layers
    ]
    hooks.append(layers[-1].register_forward_hook(lambda module, args, out: found.append(out)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    try:
        model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def block_influence(model, batches):
    """1 - the mean cosine between what enters and what leaves each layer, over real tokens.

    ShortGPT, arXiv:2403.03853
    """
    total, n_tokens = 0, 0
    for batch in batches:
        real = batch["attention_mask"].bool()
        distances = []
        for before, after in pairwise(states(model, batch)):
            distance = 1 - torch.cosine_similarity(before, after, dim=-1)
            distances.append(float(distance[real].double().sum()))
        total += np.array(distances)
        n_tokens += int(real.sum())
    return total / n_tokens


def angular_distance(model, batches, n):
    """Angle between what enters layer i and layer i + n at each row's last token, over pi.

    arXiv:2403.17887
    """
    found = []
    for batch in batches:
        last = batch["attention_mask"].sum(1) - 1
        at_last = [state[range(len(last)), last] for state in states(model, batch)]
        cosines = [
            torch.cosine_similarity(before, after, dim=-1).double()
            for before, after in zip(at_last[:-n], at_last[n:], strict=True)
        ]
        found.append(torch.stack(cosines).clamp(-1, 1).arccos() / torch.pi)
    return torch.cat(found, 1).mean(1).numpy()


# ---- side by side


@dataclass
class Study:
    "What a tool computes, and what is exact."

    tool: str
    what: str
    run: object  # callable of folder and case → the callable that is timed
    ours: object  # callable of batches → scores of the layers, or (order of removal, NLL by step)
    read: object  # what the tool gives → the same, in our unit
    same_unit: bool = True  # False: another criterion, of which only the ranking can be compared


def greedy_order(case, batches):
    table = greedy(case.model, batches, case.k)
    return table.layer.tolist(), table.nll.to_numpy()


def nll_without_each(case, batches):
    return drop_one(case.model, batches).nll.to_numpy()


def nll_from_disk(case, batches):
    model, _ = load_base(case.path)
    return drop_one(model, batches).nll.to_numpy()


def angular_from_1(case, batches):
    "For PruneMe, which leaves out the blocks that begin with layer 0."
    return angular_distance(case.model, batches, case.k)[1:]


def reloading(folder, case):
    "The loop that needs no tool."
    return functools.partial(reload_loop, case)


def offers(case):
    "All studies; `read` brings what a tool gives into our unit."
    tokens, n, bind = case.ids.numel(), case.k, functools.partial
    nll, influence = bind(nll_without_each, case), bind(block_influence, case.model)
    by_ppl, by_taylor = (bind(shortened_llm, criterion=name) for name in ("ppl", "taylor"))

    def mean_losses(found):
        order, summed = found
        return order, summed / tokens

    def a_token(sums):
        return sums / tokens

    blocks, angles = "Block Influence", f"angular distance, n = {n}, starts from 1"
    all_blocks = "Block Influence (it computes all blocks)"
    taylor = "Taylor, against what dropping costs"
    removal, from_1 = bind(greedy_order, case), bind(angular_from_1, case)
    reload, from_disk = "a loop that reloads the model", bind(nll_from_disk, case)
    return [
        Study("SLEB", f"greedy removal of {n}", sleb, removal, mean_losses),
        Study("shortened-llm", "perplexity without each layer", by_ppl, nll, np.log),
        Study("shortened-llm", taylor, by_taylor, nll, np.array, False),
        Study("short-transformers", all_blocks, short_transformers, influence, itemgetter(0)),
        Study("ShortGPT", blocks, shortgpt, influence, a_token),
        Study("PruneMe", angles, pruneme, from_1, np.array),
        Study(reload, "loss without each layer", reloading, from_disk, np.array),
    ]


def is_there(study, folder):
    return study.tool not in PEERS or (folder / study.tool).is_dir()


def seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def ranking(scores, depth):
    "Layers, least first; `scores` of the last layers, where they are fewer."
    return [int(place) + depth - len(scores) for place in np.argsort(scores)]


def alternate(calls, runs):
    "The median of the seconds of each call."
    rounds = [[seconds(call) for call in calls] for _ in range(runs)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def joined(numbers):
    return " ".join(map(str, numbers))


def table_row(*cells):
    return f"| {' | '.join(cells)} |"


def row(study, case, folder, runs):
    "One line of the table; runs alternate."
    theirs = study.run(folder / study.tool, case)
    ours, single = (functools.partial(study.ours, b) for b in (case.batch, case.single))
    found, exact, correlation = study.read(theirs()), ours(), ""
    if isinstance(exact, tuple):
        (order, found), (right, exact) = found, exact
    else:
        order, right = ranking(found, case.depth), ranking(exact, case.depth)
        correlation = f"{spearmanr(found, exact).statistic:.3f}"
    theirs_s, ours_s, single_s = alternate([theirs, ours, single], runs)
    return table_row(
        study.tool,
        study.what,
        joined(order),
        "same" if order == right else f"differs: {joined(right)}",
        correlation,
        f"{np.abs(found - exact).max():.1g}" if study.same_unit else "",
        f"{theirs_s:.3f}",
        f"{ours_s:.3f}",
        f"**{theirs_s / ours_s:.2f}x**",
        f"{theirs_s / single_s:.2f}x",
    )


COLUMNS = (
    "tool",
    "what it computes",
    "its layers, least first",
    "exact",
    "Spearman",
    "largest difference",
    "theirs, s",
    "ours, s",
    "factor",
    "ours with one row a batch",
)
HEADER = f"{table_row(*COLUMNS)}\n|:--|:--|:--|:--|--:|--:|--:|--:|--:|--:|"


def place(folder, file, code):
    "`file:line` of a peer's code."
    lines = (folder / file).read_text().splitlines()
    number = next(n for n, line in enumerate(lines, 1) if code in line)
    return f"`{file}:{number}`"


# ---- where their numbers are wrong


class Claim(NamedTuple):
    "A fault of a peer's code."

    file: str
    code: str  # as it stands there
    shown: bool  # whether the measurement shows the fault
    text: str  # what was measured


def nll_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def ragged(case):
    """Two texts, and their Block Influence over real tokens only.

    The second is a third as long as it was.
    """
    texts = [case.texts[0], case.texts[1][: len(case.texts[1]) // 3]]
    options = dict(return_tensors="pt", padding=True, truncation=True, max_length=case.length)
    both = case.tokenizer(texts, **options)
    labels = both["input_ids"].where(both["attention_mask"].bool(), -100)
    return texts, block_influence(case.model, [dict(both, labels=labels)])


def with_bos(case, ids):
    "BOS in each row's first place."
    return torch.cat([torch.full((len(ids), 1), case.tokenizer.bos_token_id), ids[:, 1:]], 1)


def fault(gap):
    "Whether a difference of logits is there, or an error, and in words."
    try:
        apart = float(gap())
    except Exception as error:
        return True, said(error)
    return apart > 1e-4, f"logits up to {apart:.2g} off"


def sleb_length(folder, case):
    _, loss = sleb(folder, case)()
    n_predicted = case.ids.numel() - len(case.ids)
    true = greedy(case.model, case.batch, case.k).nll[0] * n_predicted
    return Claim(
        "sleb.py",
        "loss = loss.float() * model.seqlen",
        loss[0] > true * 1.001,
        f"a window of {case.length} tokens predicts {case.length - 1}, but its mean loss is "
        f"multiplied by {case.length}: summed loss {loss[0]:.1f} for a true {true:.1f}; no effect "
        "on the order",
    )


def sleb_barriers(folder, case):
    order, _ = sleb(folder, case)()
    inner, _ = sleb(folder, case, (1, 1))()
    return Claim(
        "sleb.py",
        "for j in range(early_barrier",
        inner != order,
        f"by its defaults the first and the last layer are never tried: it removes {inner}, the "
        f"search over all layers {order}",
    )


def sleb_name(folder, case):
    order, _ = sleb(folder, case)()
    blind, same = sleb(folder, case, name="my-mistral")()
    return Claim(
        "utils/onoff_utils/onoff.py",
        "if 'opt' in model.name.lower()",
        blind != order,
        "the model's *name* decides: with neither `opt` nor `llama` in it no layer is switched "
        f"off, all losses are {same[0]:.3f}, and {blind} is removed, for {order}",
    )


def sleb_precision(folder, case):
    order, loss = sleb(folder, case)()
    half, loss_16 = sleb(folder, case, dtype=torch.float16)()
    off = loss_16[-1] / loss[-1] - 1
    return Claim(
        "utils/model_utils.py",
        "torch_dtype='auto'",
        half != order or abs(off) > 1e-3,
        "scores, cross-entropy included, are in the checkpoint's precision: in fp16 the last "
        f"step's loss is {off:+.2%} off; order {half} for {order}",
    )


def sleb_windows(folder, case):
    order, _ = sleb(folder, case)()
    ids = case.tokenizer("\n\n".join(case.texts), return_tensors="pt").input_ids[0]
    windows = copy.copy(case)
    windows.ids = ids[: len(ids) // case.length * case.length].reshape(-1, case.length)
    plain = nll_of(case.model, windows.ids)
    bos = nll_of(case.model, with_bos(case, windows.ids))
    other, _ = sleb(folder, windows)()
    return Claim(
        "utils/data_utils.py",
        'tokenizer("\\n\\n".join(traindata[:nsamples]',
        plain > bos or other != order,
        f"texts are joined and cut: of {len(windows.ids)} windows one begins with BOS, the last "
        f"{len(ids) - windows.ids.numel()} tokens are dropped; NLL {plain:.4f}, with BOS in each "
        f"window's first place {bos:.4f}; removes {other} for {order}",
    )


def shortened_windows(folder, case):
    run = shortened_llm(folder, case, "ppl")
    run.data.load_dataset = lambda *args, **kwargs: [dict(text=text) for text in case.texts]
    length = case.length // 2

    def nll(bos):
        with quietly():
            run.set_seed(1234)
        wanted = ("bookcorpus", case.tokenizer, len(case.texts), length)
        return nll_of(case.model, run.get_examples(*wanted, add_bos_to_every=bos))

    plain, bos = nll(False), nll(True)
    return Claim(
        "src/dataset.py",
        "j = random.randint(0, tokenized_sample",
        plain > bos,
        f"windows (of {length} here) start anywhere in a text, by default without BOS: NLL "
        f"{plain:.4f}, with `--add_bos_to_every` {bos:.4f}",
    )


def small_gemma():
    "A random Gemma 3 of 4 layers, window 4."
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        num_hidden_layers=4,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Gemma3ForCausalLM(config).eval()


def shortened_layer_types(folder, case):
    run = shortened_llm(folder, case, "ppl")
    gemma = small_gemma()
    ids = torch.randint(3, 64, (1, 24))
    with torch.no_grad(), skipping(gemma, drop(4, 0)):
        right = gemma(ids).logits

    def gap():
        with quietly(), torch.no_grad():
            pruned = run.prune(gemma, [0], device="cpu")
            return (pruned(ids).logits - right).abs().max()

    wrong, what = fault(gap)
    return Claim(
        "src/utils.py",
        '"num_hidden_layers", (config.num_hidden_layers - num_pruned_blocks)',
        wrong,
        "`layer_types` is not cut along: a random Gemma 3 of 4 layers (window 4, 24 tokens) "
        f"without layer 0: {what}",
    )


def short_transformers_rows(folder, case):
    distances = short_transformers(folder, case, "angular_distance_last_token")()
    (helper,) = bring(folder, "short_transformers.utils.utils")
    exact = {n: angular_distance(case.model, case.batch, n) for n in range(1, case.depth)}
    sizes = list(exact)[:-1]
    theirs = [int(helper.get_best_pruning_start(distances, n)) for n in sizes]
    right = [int(exact[n].argmin()) for n in sizes]
    shifts = [np.abs(distances[n - 1, : case.depth - n + 1] - exact[n]).max() for n in exact]
    return Claim(
        "short_transformers/utils/utils.py",
        "layer_result = result[block_size",
        theirs != right,
        "row r holds blocks of r + 1 layers (row n - 1 is the exact distance of n to "
        f"{max(shifts):.0e}), but row n is read for n: best starts for n = 1..{len(right)} are "
        f'{theirs}, exact {right}; the heat-map\'s axis "Block size, n" (`utils/plot.py`) is '
        "shifted alike",
    )


def short_transformers_padding(folder, case):
    texts, real = ragged(case)
    padded = short_transformers(folder, case, texts=texts, batch_size=2)()[0]
    worst = np.abs(padded / real - 1).argmax()
    return Claim(
        "short_transformers/dist.py",
        "sim = cos_sim(input, output).mean().item()",
        np.abs(padded - real).max() > 1e-4,
        "padding counts where batch_size > 1: two ragged texts, Block Influence of layer "
        f"{worst} {padded[worst]:.4f} for {real[worst]:.4f}",
    )


def short_transformers_unmended(folder, case):
    today = short_transformers(folder, case, batch_size=2, mend=False)()[0]
    right = block_influence(case.model, case.batch)
    return Claim(
        "short_transformers/short_transformer.py",
        "output_hidden_states = torch.clone(result[0])",
        np.abs(today - right).max() > 1e-4,
        f"unmended, transformers {transformers.__version__}, a batch of two silently compares its "
        f"first row with both: Block Influence of layer 0 {today[0]:.4f} for {right[0]:.4f}",
    )


def short_transformers_numbers(folder, case):
    cut = short_transformers(folder, case).model
    with quietly():
        cut.prune(start_layer=2, block_size=1)
    for layer in cut.model.layers:
        layer.__dict__.pop("forward")  # its recorder, and our mending

    def gap():
        with torch.no_grad():
            cached = cut(case.ids[:1], use_cache=True).logits
            return (cached - cut(case.ids[:1], use_cache=False).logits).abs().max()

    wrong, what = fault(gap)
    return Claim(
        "short_transformers/short_transformer.py",
        "                count += 1",
        wrong,
        f"the layers left are numbered from 1; a forward pass with the KV cache: {what}",
    )


def shortgpt_sampling(folder, case):
    texts, real = ragged(case)
    rows = [case.tokenizer(texts, truncation=True, max_length=case.length).input_ids]
    n_tokens = sum(map(len, rows[0]))
    a, b = (shortgpt(folder, case, rows, seed)() / n_tokens for seed in (0, 1))
    worst = np.abs(a - b).argmax()
    return Claim(
        "short_gpt/short_llama.py",
        "for cur_pos in range(min_prompt_len, total_len)",
        not np.array_equal(a, b),
        "texts shorter than the longest of their batch are continued with *sampled* tokens, and "
        f"these count: layer {worst} {a[worst]:.4f} a token with seed 0, {b[worst]:.4f} with seed "
        f"1, for {real[worst]:.4f}",
    )


def shortgpt_clamp(folder, case):
    run = shortgpt(folder, case)
    x = torch.randn(1, 1000, 64, generator=torch.Generator().manual_seed(0))
    n_nan = int(run.module.block_influence(x, x, angular=True).isnan().sum())
    return Claim(
        "short_gpt/metrics.py",
        "return (torch.arccos(sim)",
        n_nan > 0,
        f"no clamp before arccos: of 1000 vectors compared with themselves {n_nan} give NaN",
    )


def shortgpt_slice(folder, case):
    run = shortgpt(folder, case)
    run.short.n_prune_layers, run.short.importances = 1, list(range(case.depth))
    wrong, what = fault(lambda: len(run.short.remove_layers(angular=True)) - 1)
    return Claim(
        "short_gpt/short_llama.py",
        "self.importances[:-self.n_prune_layers+1]",
        wrong,
        f"for one layer by angular distance the slice `[:-1+1]` is empty: {what}",
    )


def pruneme_norm(folder, case):
    theirs, exact = pruneme(folder, case)(), angular_distance(case.model, case.batch, case.k)
    others = np.abs(theirs - exact[1:])[:-1].max()
    return Claim(
        "compute_block_similarity/utils.py",
        "hidden_states[l], hidden_states[l + layers_to_skip]",
        abs(theirs[-1] - exact[-1]) > 1e-4,
        f"the last of `hidden_states` is after the final norm: the {case.k} layers that end the "
        f"model get {theirs[-1]:.4f} for {exact[-1]:.4f} (the other blocks agree to {others:.0e}); "
        f"least at {theirs.argmin() + 1}, exact {exact.argmin()}",
    )


def pruneme_first(folder, case):
    theirs, exact = pruneme(folder, case)(), angular_distance(case.model, case.batch, case.k)
    return Claim(
        "compute_block_similarity/layer_similarity.py",
        "last_non_padded_hidden_states[1:]",
        len(theirs) < len(exact),
        f"blocks from layer 0 are left out: {len(theirs)} of {len(exact)} starts (layer 0's "
        f"{exact[0]:.4f}, the least of the others {exact[1:].min():.4f})",
    )


def pruneme_last_batch(folder, case):
    batch_size = len(case.texts) - 1
    theirs, some = pruneme(folder, case)(), pruneme(folder, case, batch_size)()
    first = angular_from_1(case, case.single[:batch_size])
    from_all, from_first = (np.abs(some - other)[:-1].max() for other in (theirs, first))
    return Claim(
        "compute_block_similarity/layer_similarity.py",
        "drop_last=True",
        from_all > 1e-5 > from_first,
        f"{batch_size + 1} texts in batches of {batch_size}: the last is dropped without a word",
    )


# Each with its run and what is claimed of it
PEERS = {
    "SLEB": (sleb, [sleb_length, sleb_barriers, sleb_name, sleb_precision, sleb_windows]),
    "shortened-llm": (shortened_llm, [shortened_windows, shortened_layer_types]),
    "short-transformers": (
        short_transformers,
        [
            short_transformers_rows,
            short_transformers_padding,
            short_transformers_unmended,
            short_transformers_numbers,
        ],
    ),
    "ShortGPT": (shortgpt, [shortgpt_sampling, shortgpt_clamp, shortgpt_slice]),
    "PruneMe": (pruneme, [pruneme_norm, pruneme_first, pruneme_last_batch]),
}
INTRO = """# Against other tools

The same weights (fp32) and the same token rows for everyone, in one process; median of {runs} \
alternating runs, in CPU seconds of the process ({threads} thread, {machine}, torch {torch}, \
transformers {transformers}), so that other work on the machine counts little; ours includes its \
bootstrap intervals. Ours takes all rows as one batch, most of the others one text at a time: the \
last column is ours with one row a batch too. "Exact" is the kit's own result, or plain hooks \
before the final norm for Block Influence and angular distance; "same": the same layers in the \
same order. "Largest difference" is between the values (NLL in nats a token, Block Influence, \
angle over pi). A factor below 1: theirs is faster. Written by `benchmarks/peers.py`."""


# ---- the report


def commit(folder):
    command = ["git", "-C", str(folder), "log", "-1", "--format=%h of %cs"]
    printed = subprocess.run(command, capture_output=True, text=True).stdout
    return printed.strip() or "no git clone"


def said(error):
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line[:160]}"


def doc(function):
    "Its docstring in one line."
    return " ".join(function.__doc__.split())


def line(study, case, folder, runs):
    "The table's line; a tool that fails costs the others nothing."
    try:
        return row(study, case, folder, runs)
    except Exception as error:
        return f"| {study.tool} | {study.what} | failed, {said(error)} |"


def check_claims(name, folder, case):
    """Claims that the measurement bears out, and those that it does not.

    One that could not be measured is among the latter.
    """
    shown, others = [], []
    for claim_of in PEERS[name][1]:
        try:
            claim = claim_of(folder, case)
            where = place(folder, claim.file, claim.code)
        except Exception as error:
            others.append(f"- **{name}**, {claim_of.__name__}: failed, {said(error)}.")
            continue
        (shown if claim.shown else others).append(f"- **{name}** {where}: {claim.text}.")
    return shown, others


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model_help = "a Llama of 12 layers that knows data/domains"
    parser.add_argument("--peers", type=Path, required=True, help="folder of clones")
    parser.add_argument("--model", type=Path, default=ROOT / "data/tiny-base", help=model_help)
    parser.add_argument("--runs", type=int, default=RUNS)
    return parser.parse_args()


def make_cases(model):
    rows = [question_text(row) for row in load_rows(ROOT / "data/domains", split="test")]
    mixed = rows[::3] + rows[1::3] + rows[2::3]
    cases = [make_case(model, mixed, n_rows=8, length=128, k=3)]
    if (REAL / "stories260K").is_dir():
        stories = json.loads((REAL / "tinystories_clean.json").read_text())
        cases.append(make_case(REAL / "stories260K", stories, n_rows=4, length=512, k=2))
    return cases


def report_case(case, folder, runs):
    size = f"{case.depth} layers, {len(case.ids)} rows of {case.length} tokens"
    print(f"\n## {case.path.name}: {size}, each with its BOS\n\n{HEADER}", flush=True)
    for study in offers(case):
        if is_there(study, folder):
            print(line(study, case, folder, runs), flush=True)


def report_mending(folder):
    print("\n## How each was made to run\n")
    for name, (run, _) in PEERS.items():
        if (folder / name).is_dir():
            print(f"- **{name}** ({commit(folder / name)}): {doc(run)}")
        else:
            print(f"- **{name}**: no clone of it, skipped.")
    print(f"- **MetaLlama** (for ShortGPT): {doc(MetaLlama)}")
    what, _, how = doc(reload_loop).partition(". ")
    print(f"- **{what}**: {how} Ours in that line loads the model once.")


def report_claims(folder, case):
    shown, others = [], []
    for name in PEERS:
        if (folder / name).is_dir():
            of_peer = check_claims(name, folder / name, case)
            shown += of_peer[0]
            others += of_peer[1]
    print("\n## Where their numbers are wrong, and why\n")
    print(f"Measured on {case.path.name} as above; file and line as of that commit.\n")
    print("\n".join(shown))
    if others:
        print("\nLooked for, and without harm to the result here:\n")
        print("\n".join(others))


def main():
    args = parse_arguments()
    folder, cases = args.peers.resolve(), make_cases(args.model)
    intro = INTRO.format(
        runs=args.runs,
        threads=torch.get_num_threads(),
        machine=platform.machine(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    print(intro)
    for case in cases:
        report_case(case, folder, args.runs)
    report_mending(folder)
    report_claims(folder, cases[0])


if __name__ == "__main__":
    main()
