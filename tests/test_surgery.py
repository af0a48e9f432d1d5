"""
Cutting what unsloth loaded, its merge, mergekit's own run, and the names of per-layer facts.

unsloth patches the process that imports it, so each use of it has a process of its own.
"""

import logging
import os
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_kit.architecture import FIRST_LAYERS, LAST_LAYERS, LAYER_NUMBERS, PER_LAYER
from finetune_kit.core import IncompatibleConfigError
from finetune_kit.examples import tiny_model
from finetune_kit.model import load_tokenizer
from finetune_kit.plan import drop
from finetune_kit.recipes import llamacpp_recipe, mergekit_recipe
from finetune_kit.surgery import apply_plan

SETUP = """
import sys
from pathlib import Path

import torch

from finetune_kit.architecture import decoder_layers
from finetune_kit.logs import quiet
from finetune_kit.lora import add_lora, merge_lora
from finetune_kit.model import load_model, n_layers, remembered
from finetune_kit.plan import drop
from finetune_kit.surgery import apply_plan, load_for_inference, save_adapter, save_cut, skipping

out = Path(sys.argv[1])
ids = torch.arange(3, 15)[None]
torch.set_grad_enabled(False)


def load(name, **options):
    with quiet():
        return load_model(name, **options)


def logits_of(model):
    return model(ids, use_cache=False).logits


def hand_through(module, args, kwargs, output):
    hidden = args[0] if args else kwargs["hidden_states"]
    is_several = isinstance(output, (tuple, list))
    return type(output)((hidden, *output[1:])) if is_several else hidden


def handed_through(model, plan):
    layers = [decoder_layers(model)[i] for i in plan.dropped]
    hooks = [layer.register_forward_hook(hand_through, with_kwargs=True) for layer in layers]
    logits = logits_of(model)
    for hook in hooks:
        hook.remove()
    return logits


def greedy(model, use_cache):
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    mask = torch.ones_like(ids)
    return model.generate(input_ids=ids, attention_mask=mask, use_cache=use_cache, **options)


def adapted(model):
    lora = add_lora(model, r=4)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data += torch.randn_like(parameter) * 0.05
    return lora.eval()
"""

CUT_AND_RELOAD = """
quant = sys.argv[2] or None
model, tokenizer = load("data/tiny-base", quant=quant, backend="unsloth")
assert remembered(model).backend == "unsloth"
plan = drop(model, "0,7")
whole_logits = logits_of(model)
facts = model.config.to_dict()
expected = handed_through(model, plan)

with skipping(model, plan):
    assert torch.equal(logits_of(model), expected)
    assert torch.equal(greedy(model, True), greedy(model, False))
assert torch.equal(logits_of(model), whole_logits)
assert model.config.to_dict() == facts

apply_plan(model, plan)
assert torch.equal(logits_of(model), expected)
assert torch.equal(greedy(model, True), greedy(model, False))

lora = adapted(model)
expected = lora(ids).logits
save_adapter(lora, tokenizer, out / "adapter", "data/tiny-base", plan)
with quiet():
    reloaded, _ = load_for_inference(out / "adapter", quant=quant, backend="unsloth")
assert n_layers(reloaded) == 10
assert torch.allclose(reloaded(ids).logits, expected, atol=1e-4)

if quant is None:
    folder = save_cut(merge_lora(lora), tokenizer, out / "merged")
    merged, _ = load(folder, backend="transformers")
    assert torch.allclose(merged(ids).logits, expected, atol=1e-4)
"""

MERGE_BY_SHARDS = """
import unsloth
from transformers import AutoModelForCausalLM
from unsloth_zoo.saving_utils import merge_and_overwrite_lora


def reload(folder):
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def model_name(name, load_in_4bit=False):
    return name


def by_shards(lora, folder):
    with quiet():
        merge_and_overwrite_lora(model_name, lora, tokenizer, save_directory=str(folder))
    return reload(folder)


def is_right(model):
    "Merged in 16 bits, so close is as near as it comes."
    return torch.allclose(model(ids).logits.softmax(-1), expected.softmax(-1), atol=0.02)


model, tokenizer = load("data/tiny-base", backend="unsloth")
whole_name = model.config._name_or_path
plan = drop(model, 7)
lora = adapted(apply_plan(model, plan))
expected = lora(ids).logits

with quiet():
    lora.save_pretrained_merged(str(out / "memory"), tokenizer)
print("in memory, on a CPU:", "right" if is_right(reload(out / "memory")) else "wrong")

try:
    by_shards(lora, out / "marked")
except Exception as e:
    print("refused:", str(e)[:300])
else:
    raise AssertionError("merged from " + lora.config._name_or_path)

# As it would be without the mark that apply_plan leaves
lora.config._name_or_path = whole_name
from_whole_base = by_shards(lora, out / "wrong")
print("whole base:", n_layers(from_whole_base), "layers by its configuration")
assert not is_right(from_whole_base)

model, tokenizer = load("data/tiny-base", backend="unsloth")
save_cut(apply_plan(model, plan), tokenizer, out / "cut")
lora = adapted(model)
expected = lora(ids).logits
from_cut_base = by_shards(lora, out / "right")
assert n_layers(from_cut_base) == 11
assert is_right(from_cut_base)
"""


def run_with_unsloth(code, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", SETUP + code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "it cannot be imported" in result.stderr:
        pytest.skip("unsloth cannot be imported here")
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("quant", ["", pytest.param("4bit", marks=pytest.mark.slow)])
def test_loaded_by_unsloth(tmp_path, quant):
    "Skipped and cut as hooks do, to the bit; restored exactly; adapter and merged model come back."
    run_with_unsloth(CUT_AND_RELOAD, tmp_path, quant)


@pytest.mark.slow
def test_unsloth_merge_that_reads_the_weights_again(tmp_path):
    """
    A model cut by `apply_plan` is refused, one cut by `save_cut` is merged right.

    This is `merge_and_overwrite_lora`, which unsloth's `save_pretrained_merged` calls on a GPU:
    with the whole base's name, adapter i goes into the original layer i. unsloth's CPU merge works
    in memory; 2026.10.9 with peft 0.21.2 writes the adapters unmerged.
    """
    run_with_unsloth(MERGE_BY_SHARDS, tmp_path)


@pytest.fixture
def quiet_logs():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def facts_of(kind, **depth):
    "A default configuration's attributes; None: it cannot be made from the depth alone."
    try:
        return vars(CONFIG_MAPPING[kind](**depth).get_text_config())
    except Exception:
        return None


def shrinking_lists(deep, flat):
    lists = {name: value for name, value in deep.items() if isinstance(value, (list, tuple))}
    return {name for name, value in lists.items() if len(value) != len(flat.get(name) or [])}


def test_per_layer_facts_are_known(quiet_logs):
    "Every list that is shorter in a less deep model is named; lists of token ids are not."
    names = set()
    shrinking = set()
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        names |= set(facts_of(kind) or {})
        deep = facts_of(kind, num_hidden_layers=12)
        flat = facts_of(kind, num_hidden_layers=8)
        if deep is None or flat is None:
            continue
        shrinking |= shrinking_lists(deep, flat)
    known_lists = {*PER_LAYER, *LAYER_NUMBERS, *(name for name in names if "layer" in name)}
    assert {"layer_types", "mlp_layer_types", "no_rope_layers"} <= shrinking
    assert shrinking <= known_lists
    assert not {"eos_token_id", "architectures"} & known_lists
    nobody_has = {*LAYER_NUMBERS, *FIRST_LAYERS, *LAST_LAYERS} - names
    assert not nobody_has


MERGEKIT = os.environ.get("MERGEKIT", sys.executable)  # a Python that has it, if this one has not


@pytest.fixture(scope="module")
def merge():
    "mergekit's own run of a recipe."
    if subprocess.run([MERGEKIT, "-c", "import mergekit"], capture_output=True).returncode:
        pytest.skip("mergekit is not installed: pip install mergekit, or MERGEKIT=/path/to/python")

    def run(recipe, folder):
        folder.mkdir()
        file = folder / "recipe.yaml"
        file.write_text(recipe)
        command = [MERGEKIT, "-m", "mergekit.scripts.run_yaml", str(file), str(folder / "merged")]
        return subprocess.run(command, capture_output=True, text=True, timeout=600)

    return run


def save_tiny(kind, folder):
    "A tiny model of six layers and a tokenizer; the model."
    model = tiny_model(kind, n_layers=6)
    model.save_pretrained(folder)
    load_tokenizer("data/tiny-base").save_pretrained(folder)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "phi3"])
def test_recipe_run_by_mergekit(merge, tmp_path, kind):
    "mergekit's result loads as the model that `apply_plan` leaves: the same logits and count."
    model = save_tiny(kind, tmp_path / "base")
    plan = drop(model, "0,3-4")
    result = merge(mergekit_recipe(tmp_path / "base", plan), tmp_path / "run")
    assert result.returncode == 0, result.stderr[-3000:]
    apply_plan(model, plan)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged").eval()
    assert merged.config.num_hidden_layers == len(plan.keep)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, merged(ids).logits)


@pytest.mark.slow
def test_mergekit_keeps_the_length_of_layer_types(merge, tmp_path):
    "Why no recipe is given for Qwen3, whose layers are all alike: mergekit stops."
    model = save_tiny("qwen3", tmp_path / "base")
    plan = drop(model, 1)
    with pytest.raises(IncompatibleConfigError, match="layer_types"):
        mergekit_recipe(tmp_path / "base", plan)
    assert llamacpp_recipe(tmp_path / "base", plan)
    base = str(tmp_path / "base")
    slices = [dict(sources=[dict(model=base, layer_range=run)]) for run in plan.ranges]
    recipe = yaml.safe_dump(dict(slices=slices, merge_method="passthrough"))
    result = merge(recipe, tmp_path / "run")
    assert result.returncode
    assert "`num_hidden_layers` (5) must be equal to the number of `layer_types`" in result.stderr


def test_recipe_has_the_documented_form():
    "mergekit's README: slices of sources, each a model and layer_range [first, one past the last]."
    recipe = yaml.safe_load(mergekit_recipe("data/tiny-base", drop(12, "0,7-8")))
    assert set(recipe) == {"slices", "merge_method"}
    assert recipe["merge_method"] == "passthrough"
    layers = []
    for part in recipe["slices"]:
        assert set(part) == {"sources"}
        (source,) = part["sources"]
        assert set(source) == {"model", "layer_range"}
        layers += range(*source["layer_range"])
    assert layers == [1, 2, 3, 4, 5, 6, 9, 10, 11]
