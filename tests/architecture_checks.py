"""
What the kit does to a model, each beside a slow and obvious way to the same numbers.

A check calls the kit's public functions on a tiny model of a type and returns how far apart the
two ways are. The kit may refuse a model with a `FineTuneError`; it may not be wrong, and it may
not stop with anything else.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tiny_types import VOCABULARY, tiny_of_type
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from finetune_kit.architecture import decoder_layers
from finetune_kit.core import ROOT, FineTuneError
from finetune_kit.examples import ragged_batches, ragged_rows
from finetune_kit.gguf_files import check_gguf
from finetune_kit.importance import drop_one
from finetune_kit.logs import quiet
from finetune_kit.loop import plain_loop
from finetune_kit.lora import add_lora, merge_lora
from finetune_kit.model import load_tokenizer, n_layers
from finetune_kit.plan import drop
from finetune_kit.probe import logit_distance, probe_batch, probe_logits
from finetune_kit.stream import stream_model
from finetune_kit.surgery import apply_plan, save_cut
from finetune_kit.trainer import train
from finetune_kit.training import TrainConfig

TOLERANCE = 1e-4  # of `logit_distance`, of a loss in nats, and of a relative difference
CUTS = ([1, 3], [0, 2], [-1])
CUT = CUTS[0]  # where one is enough


# The obvious ways


def hand_through(module, args, kwargs, output):
    "A layer's output replaced by its input."
    hidden = args[0] if args else kwargs["hidden_states"]
    is_several = isinstance(output, (tuple, list))
    return type(output)((hidden, *output[1:])) if is_several else hidden


class HandedThrough:
    "In a `with` block: the whole model, some of whose layers hand their input through."

    def __init__(self, model, dropped):
        self.layers = [decoder_layers(model)[place] for place in dropped]

    def __enter__(self):
        self.hooks = [
            layer.register_forward_hook(hand_through, with_kwargs=True) for layer in self.layers
        ]

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def mean_loss(model, batches):
    "Nats per scored token, by the model's own logits."
    total = 0.0
    n_scored = 0
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        targets = batch["labels"][:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        n_scored += (targets != -100).sum().item()
    return total / n_scored


def greedy(model, use_cache):
    "Tokens that follow the longer probe row, and the logits they were taken from."
    ids = probe_batch(model)["input_ids"][:1]
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        use_cache=use_cache,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.cat(output.logits).float()


def reload_distance(model, folder):
    "How far from a model's logits are those of what plain transformers loads from its folder."
    reloaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"] or report["mismatched_keys"]:
        return float("inf")
    return logit_distance(probe_logits(model), probe_logits(reloaded.float().eval()))


def tiny_tokenizer():
    "A tokenizer with as many tokens as the tiny models know."
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2"
    )


def first_step(
    trainer,  # `train` or `plain_loop`
    model_type,
):  # The log's line
    "One step on three rows, of which the short ones may share a line."
    settings = TrainConfig(
        method="full",
        max_steps=1,
        batch_size=3,
        warmup_steps=0,
        eval_every=0,
        save_every=0,
        lr=1e-4,
    )
    rows = ragged_rows((9, 5, 4))
    result = trainer(tiny_of_type(model_type), tiny_tokenizer(), rows, settings)
    return result.log.iloc[-1]


# The checks


CHECKS: dict[str, Callable[[str], float]] = {}


def check(column: str):
    "Register a function from a model type to how far apart the two ways are."

    def register(function):
        CHECKS[column] = function
        return function

    return register


@check("cut")
def cut(model_type):
    distances = []
    for dropped in CUTS:
        model = tiny_of_type(model_type)
        whole = probe_logits(model)
        with HandedThrough(model, dropped):
            expected = probe_logits(model)
        assert logit_distance(whole, expected) > TOLERANCE, "the layers do not matter"
        apply_plan(model, drop(model, dropped))
        distances.append(logit_distance(expected, probe_logits(model)))
    return max(distances)


def cut_model(model_type):
    model = tiny_of_type(model_type)
    return apply_plan(model, drop(model, CUT))


@check("reload")
def reload(model_type):
    model = cut_model(model_type)
    with tempfile.TemporaryDirectory() as folder:
        save_cut(model, tiny_tokenizer(), folder)
        return reload_distance(model, folder)


@check("cache")
def cache(model_type):
    model = cut_model(model_type)
    return logit_distance(greedy(model, False), greedy(model, True))


def study_difference(model_type, part):
    model = tiny_of_type(model_type)
    batches = ragged_batches()
    fast = drop_one(model, batches, part=part)
    naive = drop_one(model, batches, part=part, naive=True)
    expected = mean_loss(model, batches)
    differences = [*(fast.nll - naive.nll), fast.attrs["baseline"] - expected]
    if part == "layer":
        for layer in range(n_layers(model)):
            with HandedThrough(model, [layer]):
                differences.append(fast.nll[layer] - mean_loss(model, batches))
    return float(torch.tensor(differences).abs().max())


@check("study")
def study(model_type):
    return study_difference(model_type, "layer")


@check("attention")
def attention(model_type):
    return study_difference(model_type, "attention")


@check("MLP")
def mlp(model_type):
    return study_difference(model_type, "mlp")


@check("packing")
def packing(model_type):
    "The loss and the gradient of one step on rows that may lie in one line."
    kit = first_step(train, model_type)
    plain = first_step(plain_loop, model_type)
    return max(abs(kit[name] / plain[name] - 1) for name in ("loss", "grad_norm"))


def adapted(model_type):
    "A model with adapters that change what it computes."
    model = add_lora(tiny_of_type(model_type), r=2)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight += torch.randn_like(weight) * 0.05
    return model.eval()


@check("LoRA")
def lora(model_type):
    model = adapted(model_type).train()
    [batch] = ragged_batches(5)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits
    logits.float().pow(2).mean().backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    idle = [name for name, gradient in learning.items() if gradient is None]
    assert learning, "no adapter"
    assert not idle, f"{len(idle)} of {len(learning)} have no gradient: {idle[0]}"
    return 0.0


@check("merge")
def merge(model_type):
    model = adapted(model_type)
    expected = probe_logits(model)
    whole = tiny_of_type(model_type)
    assert logit_distance(probe_logits(whole), expected) > TOLERANCE, "the adapters do not matter"
    return logit_distance(expected, probe_logits(merge_lora(model)))


@check("streamed")
def streamed(model_type):
    model = tiny_of_type(model_type)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        streamed = stream_model(folder, dtype=torch.float32, device="cpu")
        return logit_distance(probe_logits(model), probe_logits(streamed))


@check("GGUF")
def gguf(model_type):
    "Only whether the kit's own writer takes it; what it writes is compared in `gguf_files`."
    check_gguf(tiny_of_type(model_type), load_tokenizer(ROOT / "data/tiny-base"))
    return 0.0


# What transformers itself does with the whole model


def reads_back(model_type):
    model = tiny_of_type(model_type)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return reload_distance(model, folder) <= TOLERANCE


def caches_exactly(model_type):
    model = tiny_of_type(model_type)
    return logit_distance(greedy(model, False), greedy(model, True)) <= TOLERANCE


def learns(model_type):
    return first_step(plain_loop, model_type)["loss"] > 0


# Column → what must hold of the whole model, and what to say where it does not
NEEDS = dict(
    reload=(reads_back, "transformers does not read the whole model back as it wrote it"),
    streamed=(reads_back, "transformers does not read the whole model back as it wrote it"),
    cache=(caches_exactly, "the whole model's cache is not exact"),
    packing=(learns, "the whole model does not train on padded rows"),
    LoRA=(learns, "the whole model does not train on padded rows"),
)


def missing_in_transformers(column: str, model_type: str) -> str:
    "What transformers does not do, or an empty text."
    if column not in NEEDS:
        return ""
    holds, otherwise = NEEDS[column]
    try:
        return "" if holds(model_type) else otherwise
    except Exception:
        return otherwise


# What came of them


@dataclass(frozen=True)
class Cell:
    "What came of a check."

    kind: str  # "ok", "refused", "not compared", "WRONG" or "ERROR"
    text: str = ""  # How far apart; or what the exception says

    @property
    def is_fault(self) -> bool:
        return self.kind.isupper()

    def __str__(self):
        separator = ": " if self.kind.islower() else " "
        return f"{self.kind}{separator}{self.text}" if self.text else self.kind


def first_line(error: Exception) -> str:
    "The first line of what an exception says, 300 characters of it."
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""


def first_outcome(column, model_type) -> Cell:
    "Run a check, whatever it does."
    try:
        distance = CHECKS[column](model_type)
    except FineTuneError as error:
        return Cell("refused", f"{type(error).__name__}: {first_line(error)}")
    except AssertionError as error:
        return Cell("WRONG", first_line(error))
    except Exception as error:
        return Cell("ERROR", f"{type(error).__name__}: {first_line(error)}")
    return Cell("ok") if distance <= TOLERANCE else Cell("WRONG", f"{distance:.2g}")


def outcome(
    column: str,  # One of `CHECKS`
    model_type: str,  # One of `decoder_types`
) -> Cell:
    "What came of a check. It is no fault of the kit where the whole model has it too."
    with quiet():
        cell = first_outcome(column, model_type)
        missing = missing_in_transformers(column, model_type) if cell.is_fault else ""
    return Cell("not compared", missing) if missing else cell


def weights_adapted(
    model_type: str,  # One of `decoder_types`
) -> float:  # In [0, 1]
    "The share of the decoder layers' matrices that merged adapters have changed."
    before = decoder_layers(tiny_of_type(model_type)).state_dict()
    with quiet():
        after = decoder_layers(merge_lora(adapted(model_type))).state_dict()
    matrices = {name: weight for name, weight in before.items() if weight.dim() > 1}
    changed = [w.numel() for name, w in matrices.items() if not torch.equal(w, after[name])]
    return sum(changed) / sum(weight.numel() for weight in matrices.values())
