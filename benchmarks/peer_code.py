"""Other tools' own code, imported from their clones and run on a `Case` of `peers.py`.

A function for each tool takes its clone's folder and the case, and gives a callable: the run that is timed. What today's libraries, a machine without a GPU or the want of a
hub break is mended from outside; its docstring says what and why, and `peers.py` prints it. Nothing here is fetched, and nothing of theirs is kept."""

import contextlib, copy, csv, functools, importlib, io, re, runpy, sys, tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import datasets, numpy as np, torch
from transformers import AutoModelForCausalLM, DynamicCache


@contextlib.contextmanager
def quietly():
    with io.StringIO() as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


@contextlib.contextmanager
def known_as(folder, **modules):
    "Modules under these names for the time of the block, and what they bring in from a peer's folder forgotten after it: several peers have a module `utils`."
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


class CpuTorch:
    'torch for code that has "cuda" written into it (SLEB, sramshetty\'s ShortGPT): whatever device it names is the CPU.'

    device = staticmethod(lambda *args: torch.device("cpu"))

    def __getattr__(self, name):
        f = getattr(torch, name)
        return (
            (lambda *args, device=None, **kwargs: f(*args, **kwargs))
            if name in ("full", "tensor")
            else f
        )


def sleb(folder, case, barriers=(0, 0), name="llama", dtype=None):
    """Its own search loop, `sleb.sleb`: → (order of removal, loss of each step). Mended: its decoder layer unpacks three values from the attention, which gives two today,
    and returns a tuple, where a layer returns a tensor today; "cuda:0"; `fire` is not needed; its model and texts come from a hub."""
    module, onoff = bring(folder, "sleb", "utils.onoff_utils.onoff_llama", fire=stub("fire"))

    class Layer(onoff.OnOff_LlamaDecoderLayer):
        def __init__(self, layer):
            super().__init__(layer)
            self.self_attn.register_forward_hook(lambda m, args, out: (*out, None))

        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)[0]

    def get_llm(_):
        model = copy.deepcopy(case.model).to(dtype)
        model.seqlen, model.name = case.length, name
        return model

    onoff.OnOff_LlamaDecoderLayer, module.torch, module.get_llm = Layer, CpuTorch(), get_llm
    module.get_trainloaders = lambda *args, **kwargs: SimpleNamespace(
        input_ids=case.ids.reshape(1, -1)
    )

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
            steps = re.findall(
                r"SELECTED block \d+ \(Originally block (\d+)\)\] Loss=([\d.]+|nan)",
                said.getvalue(),
            )
        return [int(layer) for layer, _ in steps], np.array([float(loss) for _, loss in steps])

    run.module = module
    return run


def shortened_llm(folder, case, criterion):
    "Its script `anal_block_sensitivity_*.py`: → score of each layer. Mended: its vendored peft does not import today and is not needed; its model and texts come from a hub."
    peft = {
        "LLMPruner": stub("LLMPruner"),
        "LLMPruner.peft": stub("LLMPruner.peft", PeftModel=None),
    }
    data, utils = bring(folder / "src", "dataset", "utils", **peft)
    get_examples, data.get_examples, utils.get_model = (
        data.get_examples,
        lambda **kwargs: case.ids,
        lambda **kwargs: (case.model, case.tokenizer, ""),
    )

    def run():
        with (
            tempfile.TemporaryDirectory() as out,
            known_as(folder, dataset=data, utils=utils),
            quietly(),
        ):
            with patch.object(
                sys,
                "argv",
                [
                    "",
                    "--device",
                    "cpu",
                    "--num_calib_data",
                    str(len(case.ids)),
                    "--output_dir",
                    out,
                ],
            ):
                runpy.run_path(
                    str(folder / f"src/anal_block_sensitivity_{criterion}.py"), run_name="__main__"
                )
            rows = list(
                csv.DictReader(
                    open(
                        Path(out)
                        / (
                            "all_ppl_unsorted.csv"
                            if criterion == "ppl"
                            else "block_score_sorted.csv"
                        )
                    )
                )
            )
        scores = (
            {int(float(r["removed_block"])): float(r["ppl_bookcorpus"]) for r in rows}
            if criterion == "ppl"
            else {int(r["block_index"]): float(r["block_score"]) for r in rows}
        )
        return np.array([scores[i] for i in range(case.depth)])

    run.data, run.get_examples, run.set_seed, run.prune = (
        data,
        get_examples,
        utils.set_seed,
        utils.get_block_pruned_network,
    )
    return run


def short_transformers(folder, case, metric="bi_score", texts=None, batch_size=1, mend=True):
    "Its `analyse_layers`: → (layers, layers), row r: blocks of r + 1 layers. Mended: it takes `result[0]` of a layer's output, a tuple then, a tensor today (so `[0]` is the batch's first row)."
    package, dist = bring(folder, "short_transformers", "short_transformers.dist")
    model, texts = copy.deepcopy(case.model), texts or case.texts
    for layer in model.model.layers if mend else []:
        layer.forward = lambda *args, f=layer.forward, **kwargs: (f(*args, **kwargs),)
    short = package.ShortTransformer.from_model(model, distance=getattr(dist, metric))
    for layer in model.model.layers if mend else []:
        layer.forward = lambda *args, f=layer.forward, **kwargs: f(*args, **kwargs)[0]
    rows = (
        datasets.Dataset.from_dict(dict(content=texts))
        if batch_size > 1
        else [dict(content=t) for t in texts]
    )

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
    "sramshetty's ShortGPT wraps Meta's own `llama` package (not installable; needs CUDA and fairscale). Mended: the same weights behind the attributes that it uses of Meta's Transformer."

    def __init__(self, model):
        super().__init__()
        base, self.cache = model.model, DynamicCache()
        self.tok_embeddings, self.norm, self.output, self.layers = (
            base.embed_tokens,
            base.norm,
            model.lm_head,
            torch.nn.ModuleList(base.layers),
        )
        self.freqs_cis, self.rotary, self.params = (
            torch.arange(512),
            base.rotary_emb,
            SimpleNamespace(max_batch_size=64, max_seq_len=512),
        )
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
    'Its `eval_importance`, text by text: → Block Influence of each layer, a sum over tokens. Mended: `MetaLlama`, and "cuda".'
    (module,) = bring(
        folder / "short_gpt",
        "short_llama",
        llama=stub("llama", Llama=object, Transformer=MetaLlama),
    )
    module.torch, rows = CpuTorch(), rows or [[r] for r in case.ids.tolist()]
    short = module.ShortLlama(
        SimpleNamespace(
            model=MetaLlama(copy.deepcopy(case.model)),
            tokenizer=SimpleNamespace(pad_id=-1, eos_id=case.tokenizer.eos_token_id),
        )
    )

    def run():
        torch.manual_seed(seed)
        short.importances = [0] * case.depth
        for r in rows:
            short.eval_importance(r)
        return np.array(short.importances)

    run.module, run.short = module, short
    return run


def pruneme(folder, case, batch_size=None):
    "Its `main`: → angular distance of the blocks that it names 1..layers - n. Mended: no 4-bit weights, so that they are everybody's; `output_hidden_states` goes into the call; its model and texts come from a hub."
    (module,) = bring(folder / "compute_block_similarity", "layer_similarity")

    class Model:
        config = case.model.config

        def eval(self):
            pass

        def __call__(self, **inputs):
            return case.model(**inputs, output_hidden_states=True)

    module.AutoModelForCausalLM, module.AutoTokenizer = (
        SimpleNamespace(from_pretrained=lambda *args, **kwargs: Model()),
        SimpleNamespace(from_pretrained=lambda *args: case.tokenizer),
    )
    module.BitsAndBytesConfig, module.datasets = (
        (lambda **kwargs: None),
        SimpleNamespace(
            load_dataset=lambda *args, **kwargs: datasets.Dataset.from_dict(dict(text=case.texts))
        ),
    )

    def run():
        with tempfile.TemporaryDirectory() as out, contextlib.chdir(out), quietly():
            module.main("", "", "text", batch_size or len(case.texts), case.length, case.k)
            return np.array(
                [float(r["average_distance"]) for r in csv.DictReader(open("layer_distances.csv"))]
            )

    return run


def reload_loop(case):
    "What many scripts do: for each layer, load the model from disk, delete the layer, score text by text."
    nll = []
    for i in range(case.depth):
        with quietly():
            model = AutoModelForCausalLM.from_pretrained(case.path, dtype=torch.float32).eval()
        del model.model.layers[i]
        for n, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = n
        model.config.num_hidden_layers -= 1
        with torch.no_grad():
            nll.append(
                np.mean([model(input_ids=r[None], labels=r[None]).loss.item() for r in case.ids])
            )
    return np.array(nll)
