"""Other tools' layer importance against ours, on the same weights and tokens, in one process:

    python benchmarks/peers.py --peers FOLDER_OF_CLONES > benchmarks/peers.md

FOLDER_OF_CLONES holds git clones named short-transformers, SLEB, shortened-llm, ShortGPT and PruneMe; one that is absent is skipped. Their own code runs;
what today's libraries or a machine without a GPU break is mended from outside, in `peer_code.py`, which says how. Nothing is fetched."""

import argparse, copy, functools, json, platform, statistics, subprocess, time
from dataclasses import dataclass
from pathlib import Path

import numpy as np, torch, transformers
from scipy.stats import spearmanr
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from finetune_kit.rows import load_rows
from finetune_kit.importance import drop_one, greedy
from finetune_kit.model import load_model
from finetune_kit.plan import drop
from finetune_kit.architecture import decoder_layers
from finetune_kit.surgery import skipping
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

ROOT, REAL, RUNS = Path(__file__).parents[1], Path(__file__).parents[2] / "shared/real", 3


# ---- the same weights and tokens for everyone


@dataclass
class Case:
    "A model and texts that all have at least `length` tokens, so that the rows are equally long and every tool sees the same tokens."

    path: Path
    model: object
    tokenizer: object
    texts: list
    length: int
    k: int  # layers that greedy removes; size of the block for angular distance

    @functools.cached_property
    def ids(self):
        return torch.cat(
            [
                self.tokenizer(
                    t, return_tensors="pt", truncation=True, max_length=self.length
                ).input_ids
                for t in self.texts
            ]
        )

    @property
    def batch(self):
        return [dict(input_ids=self.ids, attention_mask=torch.ones_like(self.ids), labels=self.ids)]

    @property
    def single(self):
        return [
            {key: v[i : i + 1] for key, v in self.batch[0].items()} for i in range(len(self.ids))
        ]

    @property
    def depth(self):
        return len(decoder_layers(self.model))


def case(path, pieces, n_rows, length, k):
    model, tokenizer = load_model(path, backend="transformers", device="cpu")
    texts, text = [], ""
    for piece in pieces:
        text = f"{text} {piece}".strip()
        if len(tokenizer(text).input_ids) >= length:
            texts.append(text)
            text = ""
        if len(texts) == n_rows:
            break
    return Case(path, model, tokenizer, texts, length, k)


def question_text(row):
    "As in the documents that tiny-base was trained on."
    user, assistant = (
        next(m["content"] for m in row["messages"] if m["role"] == role)
        for role in ("user", "assistant")
    )
    return f"Question: {user} Answer: {assistant}"


# ---- what is exact: states by plain hooks, before the final norm


def states(model, batch):
    "What enters each layer, and what leaves the last: layers + 1 tensors (batch, seq, hidden)."
    layers, found = decoder_layers(model), []
    hooks = [l.register_forward_pre_hook(lambda m, args: found.append(args[0])) for l in layers]
    hooks.append(layers[-1].register_forward_hook(lambda m, args, out: found.append(out)))
    try:
        with torch.no_grad():
            model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            )
    finally:
        for h in hooks:
            h.remove()
    return found


def block_influence(model, batches):
    "1 - the mean cosine between what enters and what leaves each layer, over real tokens. ShortGPT, arXiv:2403.03853"
    total, tokens = 0, 0
    for b in batches:
        h, real = states(model, b), b["attention_mask"].bool()
        total += np.array(
            [1 - torch.cosine_similarity(x, y, dim=-1)[real].double() for x, y in zip(h, h[1:])]
        ).sum(1)
        tokens += int(real.sum())
    return total / tokens


def angular_distance(model, batches, n):
    "Angle between what enters layer i and what enters layer i + n at each row's last token, over pi. arXiv:2403.17887"
    found = []
    for b in batches:
        h, last = states(model, b), b["attention_mask"].sum(1) - 1
        cos = [
            torch.cosine_similarity(
                x[range(len(last)), last], y[range(len(last)), last], dim=-1
            ).double()
            for x, y in zip(h, h[n:])
        ]
        found.append(torch.stack(cos).clamp(-1, 1).arccos() / torch.pi)
    return torch.cat(found, 1).mean(1).numpy()


# ---- side by side


@dataclass
class Study:
    tool: str
    what: str
    prepare: object  # callable → the callable that is timed, which gives what the tool gives
    ours: object  # callable of batches → the exact scores of the layers, or (order of removal, NLL of each step)
    read: object  # what the tool gives → the same, in our unit
    same_unit: bool = True  # False: another criterion, of which only the ranking can be compared


def greedy_order(case, batches):
    table = greedy(case.model, batches, case.k)
    return table.layer.tolist(), table.nll.to_numpy()


def studies(case, folder):
    "One for each tool that is there, and the loop that needs none."
    tokens, n, start = case.ids.numel(), case.k, functools.partial
    nll, influence = (
        (lambda b: drop_one(case.model, b).nll.to_numpy()),
        start(block_influence, case.model),
    )
    from_disk = lambda b: drop_one(
        load_model(case.path, backend="transformers", device="cpu")[0], b
    ).nll.to_numpy()
    offers = [
        (
            "SLEB",
            sleb,
            f"greedy removal of {n}",
            start(greedy_order, case),
            lambda found: (found[0], found[1] / tokens),
        ),
        (
            "shortened-llm",
            start(shortened_llm, criterion="ppl"),
            "perplexity without each layer",
            nll,
            np.log,
        ),
        (
            "shortened-llm",
            start(shortened_llm, criterion="taylor"),
            "Taylor, against what dropping costs",
            nll,
            np.array,
            False,
        ),
        (
            "short-transformers",
            short_transformers,
            "Block Influence (it computes all blocks)",
            influence,
            lambda blocks: blocks[0],
        ),
        ("ShortGPT", shortgpt, "Block Influence", influence, lambda sums: sums / tokens),
        (
            "PruneMe",
            pruneme,
            f"angular distance, n = {n}, starts from 1",
            lambda b: angular_distance(case.model, b, n)[1:],
            np.array,
        ),
    ]
    return [
        Study(tool, what, start(run, folder / tool, case), *rest)
        for tool, run, what, *rest in offers
        if (folder / tool).is_dir()
    ] + [
        Study(
            "a loop that reloads the model",
            "loss without each layer",
            lambda: start(reload_loop, case),
            from_disk,
            np.array,
        )
    ]


def seconds(f):
    start = time.process_time()
    f()
    return time.process_time() - start


def ranking(scores, depth):  # `scores` of the last layers, where they are fewer
    return [int(i) + depth - len(scores) for i in np.argsort(scores)]


def row(study, case, runs):
    "One line of the table; runs alternate."
    calls = [study.prepare(), lambda: study.ours(case.batch), lambda: study.ours(case.single)]
    found, exact = study.read(calls[0]()), calls[1]()
    theirs, ours, single = (
        statistics.median(t) for t in zip(*[[seconds(f) for f in calls] for _ in range(runs)])
    )
    if isinstance(exact, tuple):
        (order, found), (right, exact), rho = found, exact, ""
    else:
        order, right, rho = (
            ranking(found, case.depth),
            ranking(exact, case.depth),
            f"{spearmanr(found, exact).statistic:.3f}",
        )
    verdict = "same" if order == right else f"differs: {' '.join(map(str, right))}"
    apart = f"{np.abs(found - exact).max():.1g}" if study.same_unit else ""
    return f"| {study.tool} | {study.what} | {' '.join(map(str, order))} | {verdict} | {rho} | {apart} | {theirs:.3f} | {ours:.3f} | **{theirs / ours:.2f}x** | {theirs / single:.2f}x |"


HEADER = """| tool | what it computes | its layers, least first | exact | Spearman | largest difference | theirs, s | ours, s | factor | ours with one row a batch |
|:--|:--|:--|:--|--:|--:|--:|--:|--:|--:|"""


def place(folder, file, code):
    "`file:line` of a peer's code."
    lines = (folder / file).read_text().splitlines()
    return f"`{file}:{next(n for n, line in enumerate(lines, 1) if code in line)}`"


# ---- where their numbers are wrong: (file, its code there, whether the measurement shows the fault, what was measured)


def nll_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def ragged(case):
    "Two texts, the second a third as long as the first, and their Block Influence over real tokens only."
    texts = [case.texts[0], case.texts[1][: len(case.texts[1]) // 3]]
    both = case.tokenizer(
        texts, return_tensors="pt", padding=True, truncation=True, max_length=case.length
    )
    return texts, block_influence(
        case.model,
        [dict(both, labels=both["input_ids"].where(both["attention_mask"].bool(), -100))],
    )


def with_bos(case, ids):
    "BOS in each row's first place."
    return torch.cat([torch.full((len(ids), 1), case.tokenizer.bos_token_id), ids[:, 1:]], 1)


def sleb_faults(folder, case):
    order, loss = sleb(folder, case)()
    true = greedy(case.model, case.batch, case.k).nll[0] * (case.ids.numel() - len(case.ids))
    yield (
        "sleb.py",
        "loss = loss.float() * model.seqlen",
        loss[0] > true * 1.001,
        (
            f"a window of {case.length} tokens predicts {case.length - 1}, but its mean loss is multiplied by {case.length}: summed loss {loss[0]:.1f} for a true {true:.1f}; no effect on the order"
        ),
    )
    inner = sleb(folder, case, (1, 1))()[0]
    yield (
        "sleb.py",
        "for j in range(early_barrier",
        inner != order,
        f"by its defaults the first and the last layer are never tried: it removes {inner}, the search over all layers {order}",
    )
    blind, same = sleb(folder, case, name="my-mistral")()
    yield (
        "utils/onoff_utils/onoff.py",
        "if 'opt' in model.name.lower()",
        blind != order,
        (
            f"the model's *name* decides: with neither `opt` nor `llama` in it no layer is switched off, all losses are {same[0]:.3f}, and {blind} is removed, for {order}"
        ),
    )
    half, loss16 = sleb(folder, case, dtype=torch.float16)()
    yield (
        "utils/model_utils.py",
        "torch_dtype='auto'",
        half != order or abs(loss16[-1] / loss[-1] - 1) > 1e-3,
        (
            f"scores, cross-entropy included, are in the checkpoint's precision: in fp16 the last step's loss is {loss16[-1] / loss[-1] - 1:+.2%} off; order {half} for {order}"
        ),
    )
    joined = copy.copy(case)
    ids = case.tokenizer("\n\n".join(case.texts), return_tensors="pt").input_ids[0]
    joined.ids = ids[: len(ids) // case.length * case.length].reshape(-1, case.length)
    plain, bos, other = (
        nll_of(case.model, joined.ids),
        nll_of(case.model, with_bos(case, joined.ids)),
        sleb(folder, joined)()[0],
    )
    yield (
        "utils/data_utils.py",
        'tokenizer("\\n\\n".join(traindata[:nsamples]',
        plain > bos or other != order,
        (
            f"texts are joined and cut: of {len(joined.ids)} windows one begins with BOS, the last {len(ids) - joined.ids.numel()} tokens are dropped; NLL {plain:.4f}, with BOS in each window's first place {bos:.4f}; removes {other} for {order}"
        ),
    )


def shortened_faults(folder, case):
    run = shortened_llm(folder, case, "ppl")
    run.data.load_dataset = lambda *args, **kwargs: [dict(text=t) for t in case.texts]

    def nll(bos):
        with quietly():
            run.set_seed(1234)
        return nll_of(
            case.model,
            run.get_examples(
                "bookcorpus",
                case.tokenizer,
                len(case.texts),
                case.length // 2,
                add_bos_to_every=bos,
            ),
        )

    plain, bos = nll(False), nll(True)
    yield (
        "src/dataset.py",
        "j = random.randint(0, tokenized_sample",
        plain > bos,
        (
            f"windows (of {case.length // 2} here) start anywhere in a text, by default without BOS: NLL {plain:.4f}, with `--add_bos_to_every` {bos:.4f}"
        ),
    )
    torch.manual_seed(0)
    size = dict(
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
    gemma = Gemma3ForCausalLM(
        Gemma3TextConfig(
            num_hidden_layers=4,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            **size,
        )
    ).eval()
    ids = torch.randint(3, 64, (1, 24))
    with torch.no_grad(), skipping(gemma, drop(4, 0)):
        right = gemma(ids).logits

    def gap():
        with quietly(), torch.no_grad():
            return (run.prune(gemma, [0], device="cpu")(ids).logits - right).abs().max()

    wrong, what = fault(gap)
    yield (
        "src/utils.py",
        '"num_hidden_layers", (config.num_hidden_layers - num_pruned_blocks)',
        wrong,
        f"`layer_types` is not cut along: a random Gemma 3 of 4 layers (window 4, 24 tokens) without layer 0: {what}",
    )


def fault(gap):
    "Whether a difference of logits is there, or an error, and in words."
    try:
        apart = float(gap())
    except Exception as e:
        return True, said(e)
    return apart > 1e-4, f"logits up to {apart:.2g} off"


def short_transformers_faults(folder, case):
    distances = short_transformers(folder, case, "angular_distance_last_token")()
    (helper,) = bring(folder, "short_transformers.utils.utils")
    exact = {n: angular_distance(case.model, case.batch, n) for n in range(1, case.depth)}
    theirs, right = (
        [int(start(n)) for n in list(exact)[:-1]]
        for start in (
            lambda n: helper.get_best_pruning_start(distances, n),
            lambda n: exact[n].argmin(),
        )
    )
    shift = max(np.abs(distances[n - 1, : case.depth - n + 1] - exact[n]).max() for n in exact)
    yield (
        "short_transformers/utils/utils.py",
        "layer_result = result[block_size",
        theirs != right,
        (
            f'row r holds blocks of r + 1 layers (row n - 1 is the exact distance of n to {shift:.0e}), but row n is read for n: best starts for n = 1..{len(right)} are {theirs}, exact {right}; the heat-map\'s axis "Block size, n" (`utils/plot.py`) is shifted alike'
        ),
    )
    texts, real = ragged(case)
    padded = short_transformers(folder, case, texts=texts, batch_size=2)()[0]
    worst = np.abs(padded / real - 1).argmax()
    yield (
        "short_transformers/dist.py",
        "sim = cos_sim(input, output).mean().item()",
        np.abs(padded - real).max() > 1e-4,
        (
            f"padding counts where batch_size > 1: two ragged texts, Block Influence of layer {worst} {padded[worst]:.4f} for {real[worst]:.4f}"
        ),
    )
    today, right = (
        short_transformers(folder, case, batch_size=2, mend=False)()[0],
        block_influence(case.model, case.batch),
    )
    yield (
        "short_transformers/short_transformer.py",
        "output_hidden_states = torch.clone(result[0])",
        np.abs(today - right).max() > 1e-4,
        (
            f"unmended, transformers {transformers.__version__}, a batch of two silently compares its first row with both: Block Influence of layer 0 {today[0]:.4f} for {right[0]:.4f}"
        ),
    )
    cut = short_transformers(folder, case).model
    with quietly():
        cut.prune(start_layer=2, block_size=1)
    for layer in cut.model.layers:
        layer.__dict__.pop("forward")  # its recorder, and our mending

    def gap():
        with torch.no_grad():
            return (
                (
                    cut(case.ids[:1], use_cache=True).logits
                    - cut(case.ids[:1], use_cache=False).logits
                )
                .abs()
                .max()
            )

    wrong, what = fault(gap)
    yield (
        "short_transformers/short_transformer.py",
        "                count += 1",
        wrong,
        f"the layers left are numbered from 1; a forward pass with the KV cache: {what}",
    )


def shortgpt_faults(folder, case):
    texts, real = ragged(case)
    rows = [case.tokenizer(texts, truncation=True, max_length=case.length).input_ids]
    a, b = (shortgpt(folder, case, rows, seed)() / sum(map(len, rows[0])) for seed in (0, 1))
    worst = np.abs(a - b).argmax()
    yield (
        "short_gpt/short_llama.py",
        "for cur_pos in range(min_prompt_len, total_len)",
        not np.array_equal(a, b),
        (
            f"texts shorter than the longest of their batch are continued with *sampled* tokens, and these count: layer {worst} {a[worst]:.4f} a token with seed 0, {b[worst]:.4f} with seed 1, for {real[worst]:.4f}"
        ),
    )
    run, x = (
        shortgpt(folder, case),
        torch.randn(1, 1000, 64, generator=torch.Generator().manual_seed(0)),
    )
    nan = int(run.module.block_influence(x, x, angular=True).isnan().sum())
    yield (
        "short_gpt/metrics.py",
        "return (torch.arccos(sim)",
        nan > 0,
        f"no clamp before arccos: of 1000 vectors compared with themselves {nan} give NaN",
    )
    run.short.n_prune_layers, run.short.importances = 1, list(range(case.depth))
    wrong, what = fault(lambda: len(run.short.remove_layers(angular=True)) - 1)
    yield (
        "short_gpt/short_llama.py",
        "self.importances[:-self.n_prune_layers+1]",
        wrong,
        f"for one layer by angular distance the slice `[:-1+1]` is empty: {what}",
    )


def pruneme_faults(folder, case):
    theirs, exact = pruneme(folder, case)(), angular_distance(case.model, case.batch, case.k)
    yield (
        "compute_block_similarity/utils.py",
        "hidden_states[l], hidden_states[l + layers_to_skip]",
        abs(theirs[-1] - exact[-1]) > 1e-4,
        (
            f"the last of `hidden_states` is after the final norm: the {case.k} layers that end the model get {theirs[-1]:.4f} for {exact[-1]:.4f} (the other blocks agree to {np.abs(theirs - exact[1:])[:-1].max():.0e}); least at {theirs.argmin() + 1}, exact {exact.argmin()}"
        ),
    )
    yield (
        "compute_block_similarity/layer_similarity.py",
        "last_non_padded_hidden_states[1:]",
        len(theirs) < len(exact),
        (
            f"blocks from layer 0 are left out: {len(theirs)} of {len(exact)} starts (layer 0's {exact[0]:.4f}, the least of the others {exact[1:].min():.4f})"
        ),
    )
    bs = len(case.texts) - 1
    some, first = (
        pruneme(folder, case, bs)(),
        angular_distance(case.model, case.single[:bs], case.k)[1:],
    )
    yield (
        "compute_block_similarity/layer_similarity.py",
        "drop_last=True",
        np.abs(some - theirs)[:-1].max() > 1e-5 > np.abs(some - first)[:-1].max(),
        f"{bs + 1} texts in batches of {bs}: the last is dropped without a word",
    )


PEERS = {
    "SLEB": (sleb, sleb_faults),
    "shortened-llm": (shortened_llm, shortened_faults),
    "short-transformers": (short_transformers, short_transformers_faults),
    "ShortGPT": (shortgpt, shortgpt_faults),
    "PruneMe": (pruneme, pruneme_faults),
}
INTRO = """# Against other tools

The same weights (fp32) and the same token rows for everyone, in one process; median of {runs} alternating runs, in CPU seconds of the process ({threads} thread, {machine}, torch {torch},
transformers {transformers}), so that other work on the machine counts little; ours includes its bootstrap intervals. Ours takes all rows as one batch, most of the others one text at a time: the last column is ours with one row a batch too.
"Exact" is the kit's own result, or plain hooks before the final norm for Block Influence and angular distance; "same": the same layers in the same order. "Largest difference" is between the values
(NLL in nats a token, Block Influence, angle over pi). A factor below 1: theirs is faster. Written by `benchmarks/peers.py`."""


def commit(folder):
    return (
        subprocess.run(
            ["git", "-C", folder, "log", "-1", "--format=%h of %cs"], capture_output=True, text=True
        ).stdout.strip()
        or "no git clone"
    )


def said(e):
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:160]}"


def line(study, case, runs):
    "The table's line; a tool that fails costs the others nothing."
    try:
        return row(study, case, runs)
    except Exception as e:
        return f"| {study.tool} | {study.what} | failed, {said(e)} |"


def report_faults(name, folder, case):
    "Claims that the measurement bears out, and those that it does not (or that could not be measured)."
    seen, unseen = [], []
    try:
        for file, code, wrong, text in PEERS[name][1](folder, case):
            (seen if wrong else unseen).append(f"- **{name}** {place(folder, file, code)}: {text}.")
    except Exception as e:
        unseen.append(f"- **{name}**: failed, {said(e)}.")
    return seen, unseen


def main():
    args = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    args.add_argument("--peers", type=Path, required=True, help="folder of clones")
    args.add_argument(
        "--model",
        type=Path,
        default=ROOT / "data/tiny-base",
        help="a Llama of 12 layers that knows data/domains",
    )
    args.add_argument("--runs", type=int, default=RUNS)
    args = args.parse_args()
    here, folder = [n for n in PEERS if (args.peers / n).is_dir()], args.peers.resolve()
    rows = [question_text(r) for r in load_rows(ROOT / "data/domains", split="test")]
    cases = [case(args.model, rows[::3] + rows[1::3] + rows[2::3], 8, 128, 3)]
    if (REAL / "stories260K").is_dir():
        cases.append(
            case(
                REAL / "stories260K",
                json.loads((REAL / "tinystories_clean.json").read_text()),
                4,
                512,
                2,
            )
        )
    print(
        INTRO.format(
            runs=args.runs,
            threads=torch.get_num_threads(),
            machine=platform.machine(),
            torch=torch.__version__,
            transformers=transformers.__version__,
        )
    )
    for c in cases:
        print(
            f"\n## {c.path.name}: {c.depth} layers, {len(c.ids)} rows of {c.length} tokens, each with its BOS\n\n{HEADER}",
            flush=True,
        )
        for s in studies(c, folder):
            print(line(s, c, args.runs), flush=True)
    print("\n## How each was made to run\n")
    for name in PEERS:
        print(
            f"- **{name}**"
            + (
                f" ({commit(folder / name)}): {' '.join(PEERS[name][0].__doc__.split())}"
                if name in here
                else ": no clone of it, skipped."
            )
        )
    print(
        f"- **MetaLlama** (for ShortGPT): {MetaLlama.__doc__}\n- **{reload_loop.__doc__.split(':')[0]}**:{reload_loop.__doc__.partition(':')[2]} Ours in that line loads the model once."
    )
    seen, unseen = (
        (sum(lists, []) for lists in zip(*[report_faults(n, folder / n, cases[0]) for n in here]))
        if here
        else ([], [])
    )
    print(
        f"\n## Where their numbers are wrong, and why\n\nMeasured on {cases[0].path.name} as above; file and line as of that commit.\n\n"
        + "\n".join(seen)
    )
    if unseen:
        print("\nLooked for, and without harm to the result here:\n\n" + "\n".join(unseen))


if __name__ == "__main__":
    main()
