"""Other tools' own code, imported from their clones and run on a `Case` of `peers.py`.

A function for each tool takes its clone's folder and the case, and gives a callable: the run that
is timed. What today's libraries, a machine without a GPU or the want of a hub break is mended from
outside; its docstring says what and why, and `peers.py` prints it. Nothing here is fetched, and
nothing of theirs is kept.
"""

import contextlib
import copy
import csv
import functools
import importlib
import io
import re
import runpy
import sys
import tempfile
from operator import itemgetter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import datasets
import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache


@contextlib.contextmanager
def quietly():
    with io.StringIO() as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


@contextlib.contextmanager
def known_as(folder, **modules):
    """Modules under these names for the time of the block.

    What they bring in from a peer's folder is forgotten after it: several peers have a module
    `utils`.
    """
    before, theirs = set(sys.modules), {f.stem for f in Path(folder).iterdir()}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if name in modules or name.split(".")[0] in theirs:
                del sys.modules[name]


def bring(folder, *names, **stubs):
    "Modules from a peer's folder; `stubs` stand in for packages that it imports."
    with known_as(folder, **stubs), patch.object(sys, "path", [str(folder), *sys.path]), quietly():
        return [importlib.import_module(n) for n in names]


def stub(name, **attrs):
    module = ModuleType(name)
    vars(module).update(attrs)
    return module


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class CpuTorch:
    """torch for code that has "cuda" written into it (SLEB, sramshetty's ShortGPT).

    Whatever device it names is the CPU.
    """

    device = staticmethod(lambda *args: torch.device("cpu"))

    def __getattr__(self, name):
        function = getattr(torch, name)
        if name not in ("full", "tensor"):
            return function
        return lambda *args, device=None, **kwargs: function(*args, **kwargs)


SELECTED = re.compile(r"SELECTED block \d+ \(Originally block (\d+)\)\] Loss=([\d.]+|nan)")


def sleb_layer(base):
    "SLEB's decoder layer for today's attention and model."

    class Layer(base):
        def __init__(self, layer):
            super().__init__(layer)
            self.self_attn.register_forward_hook(lambda module, args, out: (*out, None))

        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)[0]

    return Layer


def sleb(folder, case, barriers=(0, 0), name="llama", dtype=None):
    """Its own search loop, `sleb.sleb`: → (order of removal, loss of each step).

    Mended: its decoder layer unpacks three values from the attention, which gives two today, and
    returns a tuple, where a layer returns a tensor today; "cuda:0"; `fire` is not needed; its model
    and texts come from a hub.
    """
    module, onoff = bring(folder, "sleb", "utils.onoff_utils.onoff_llama", fire=stub("fire"))

    def get_llm(_):
        model = copy.deepcopy(case.model).to(dtype)
        model.seqlen, model.name = case.length, name
        return model

    onoff.OnOff_LlamaDecoderLayer = sleb_layer(onoff.OnOff_LlamaDecoderLayer)
    module.torch, module.get_llm = CpuTorch(), get_llm
    loader = SimpleNamespace(input_ids=case.ids.reshape(1, -1))
    module.get_trainloaders = lambda *args, **kwargs: loader

    def run():
        with tempfile.TemporaryDirectory() as out, quietly() as said:
            module.sleb(
                num_blocks=case.depth,
                num_remove_blocks=case.k,
                early_barrier=barriers[0],
                latter_barrier=barriers[1],
                result_folder=out,
                eval_ppl=False,
            )
            steps = SELECTED.findall(said.getvalue())
        return [int(layer) for layer, _ in steps], np.array([float(loss) for _, loss in steps])

    run.module = module
    return run


def read_sensitivity(folder, criterion):
    "What shortened-llm's script wrote: {layer: score}."
    if criterion == "ppl":
        rows = read_table(folder / "all_ppl_unsorted.csv")
        return {int(float(row["removed_block"])): float(row["ppl_bookcorpus"]) for row in rows}
    rows = read_table(folder / "block_score_sorted.csv")
    return {int(row["block_index"]): float(row["block_score"]) for row in rows}


def shortened_llm(folder, case, criterion):
    """Its script `anal_block_sensitivity_*.py`: → score of each layer.

    Mended: its vendored peft does not import today and is not needed; its model and texts come from
    a hub.
    """
    peft = {
        "LLMPruner": stub("LLMPruner"),
        "LLMPruner.peft": stub("LLMPruner.peft", PeftModel=None),
    }
    data, utils = bring(folder / "src", "dataset", "utils", **peft)
    get_examples = data.get_examples
    data.get_examples = lambda **kwargs: case.ids
    utils.get_model = lambda **kwargs: (case.model, case.tokenizer, "")
    script = str(folder / f"src/anal_block_sensitivity_{criterion}.py")

    def run():
        with tempfile.TemporaryDirectory() as out:
            options = dict(device="cpu", num_calib_data=len(case.ids), output_dir=out)
            arguments = [""]
            for name, value in options.items():
                arguments += [f"--{name}", str(value)]
            with (
                known_as(folder, dataset=data, utils=utils),
                quietly(),
                patch.object(sys, "argv", arguments),
            ):
                runpy.run_path(script, run_name="__main__")
            scores = read_sensitivity(Path(out), criterion)
        return np.array([scores[layer] for layer in range(case.depth)])

    run.data, run.get_examples, run.set_seed = data, get_examples, utils.set_seed
    run.prune = utils.get_block_pruned_network
    return run


def answering(change, forward):
    "`forward`, its output changed."
    return lambda *args, **kwargs: change(forward(*args, **kwargs))


def short_transformers(folder, case, metric="bi_score", texts=None, batch_size=1, mend=True):
    """Its `analyse_layers`: → (layers, layers), row r: blocks of r + 1 layers.

    Mended: it takes `result[0]` of a layer's output, a tuple then, a tensor today (so `[0]` is the
    batch's first row).
    """
    package, dist = bring(folder, "short_transformers", "short_transformers.dist")
    model, texts = copy.deepcopy(case.model), texts or case.texts
    mended = list(model.model.layers) if mend else []
    for layer in mended:
        layer.forward = answering(lambda states: (states,), layer.forward)
    short = package.ShortTransformer.from_model(model, distance=getattr(dist, metric))
    for layer in mended:
        layer.forward = answering(itemgetter(0), layer.forward)
    rows = [dict(content=text) for text in texts]
    if batch_size > 1:
        rows = datasets.Dataset.from_list(rows)

    def run():
        with quietly():
            return short.analyse_layers(
                rows,
                case.tokenizer,
                limit=len(texts),
                max_length=case.length,
                batch_size=batch_size,
            )

    run.model = short
    return run


class MetaLlama(torch.nn.Module):
    """sramshetty's ShortGPT wraps Meta's own `llama` package.

    That is not installable and needs CUDA and fairscale. Mended: the same weights behind the
    attributes that it uses of Meta's Transformer.
    """

    def __init__(self, model):
        super().__init__()
        base, self.cache = model.model, DynamicCache()
        self.tok_embeddings, self.norm, self.output = base.embed_tokens, base.norm, model.lm_head
        self.layers = torch.nn.ModuleList(base.layers)
        self.freqs_cis, self.rotary = torch.arange(512), base.rotary_emb
        self.params = SimpleNamespace(max_batch_size=64, max_seq_len=512)
        for n, layer in enumerate(self.layers):
            layer.forward = functools.partial(self.call, layer.forward, n)

    def call(self, forward, n, h, start, positions, mask):
        if n == 0 and start == 0:
            self.cache = DynamicCache()
        return forward(
            h,
            attention_mask=mask if mask is None else mask[None, None],
            position_embeddings=self.rotary(h, positions[None]),
            past_key_values=self.cache,
        )


def shortgpt(folder, case, rows=None, seed=0):
    """Its `eval_importance`, text by text: → Block Influence of each layer, a sum over tokens.

    Mended: `MetaLlama`, and "cuda".
    """
    llama = stub("llama", Llama=object, Transformer=MetaLlama)
    (module,) = bring(folder / "short_gpt", "short_llama", llama=llama)
    module.torch = CpuTorch()
    rows = rows or [[row] for row in case.ids.tolist()]
    model = MetaLlama(copy.deepcopy(case.model))
    tokenizer = SimpleNamespace(pad_id=-1, eos_id=case.tokenizer.eos_token_id)
    short = module.ShortLlama(SimpleNamespace(model=model, tokenizer=tokenizer))

    def run():
        torch.manual_seed(seed)
        short.importances = [0] * case.depth
        for row in rows:
            short.eval_importance(row)
        return np.array(short.importances)

    run.module, run.short = module, short
    return run


class WithHiddenStates:
    "A model that gives its hidden states with every call."

    def __init__(self, model):
        self.model, self.config = model, model.config

    def eval(self):
        pass

    def __call__(self, **inputs):
        return self.model(**inputs, output_hidden_states=True)


def source_of(what):
    "Stands in for a class with `from_pretrained`."
    return SimpleNamespace(from_pretrained=lambda *args, **kwargs: what)


def pruneme(folder, case, batch_size=None):
    """Its `main`: → angular distance of the blocks that it names 1..layers - n.

    Mended: no 4-bit weights, so that they are everybody's; `output_hidden_states` goes into the
    call; its model and texts come from a hub.
    """
    (module,) = bring(folder / "compute_block_similarity", "layer_similarity")
    texts = datasets.Dataset.from_dict(dict(text=case.texts))
    module.AutoModelForCausalLM = source_of(WithHiddenStates(case.model))
    module.AutoTokenizer = source_of(case.tokenizer)
    module.BitsAndBytesConfig = lambda **kwargs: None
    module.datasets = SimpleNamespace(load_dataset=lambda *args, **kwargs: texts)

    def run():
        with tempfile.TemporaryDirectory() as out, contextlib.chdir(out), quietly():
            module.main("", "", "text", batch_size or len(case.texts), case.length, case.k)
            rows = read_table("layer_distances.csv")
        return np.array([float(row["average_distance"]) for row in rows])

    return run


def load_without(path, layer):
    "The model from disk, without a layer."
    with quietly():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    del model.model.layers[layer]
    for place, one in enumerate(model.model.layers):
        one.self_attn.layer_idx = place
    model.config.num_hidden_layers -= 1
    return model


@torch.no_grad()
def reload_loop(case):
    """What many scripts do.

    For each layer, load the model from disk, delete the layer, score text by text.
    """
    nll = []
    for layer in range(case.depth):
        model = load_without(case.path, layer)
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in case.ids]
        nll.append(np.mean(losses))
    return np.array(nll)
