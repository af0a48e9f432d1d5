"Cutting what unsloth loaded, its merge, mergekit's own run, and the names of per-layer facts. unsloth patches the process, so each use of it has its own."

import json, os, subprocess, sys

import pytest
from conftest import ROOT

HELPERS = """
import sys, torch
from pathlib import Path
from finetune_kit.logs import quiet
from finetune_kit.model import remembered, add_lora, load_model, lora_targets, merge_lora, n_layers
from finetune_kit.plan import drop
from finetune_kit.architecture import decoder_layers
from finetune_kit.surgery import load_for_inference, save_adapter, save_cut
from finetune_kit.cutting import apply_plan, skipping
out = Path(sys.argv[1])
ids = torch.arange(3, 15)[None]

def handed_through(model, plan):
    def hook(m, args, kwargs, output):
        h = args[0] if args else kwargs["hidden_states"]
        return (h, *output[1:]) if isinstance(output, tuple) else h
    hooks = [decoder_layers(model)[i].register_forward_hook(hook, with_kwargs=True) for i in plan.dropped]
    logits = model(ids, use_cache=False).logits
    for h in hooks: h.remove()
    return logits

def greedy(model, use_cache): return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=use_cache, eos_token_id=None, pad_token_id=0)

def adapted(model):
    lora = add_lora(model, r=4)
    for name, p in lora.named_parameters(): p.data += torch.randn_like(p)*.05 if "lora_B" in name else 0
    return lora.eval()

torch.set_grad_enabled(False)
"""


def unsloth_process(code, folder):
    done = subprocess.run(
        [sys.executable, "-c", HELPERS + code, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "it cannot be imported" in done.stderr:
        pytest.skip("unsloth cannot be imported here")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("quant", [None, pytest.param("4bit", marks=pytest.mark.slow)])
def test_loaded_by_unsloth(tmp_path, quant):
    "Skipped and cut as hooks say, to the bit; restored exactly; the adapter comes back, and the merged model too."
    unsloth_process(
        f"quants = [{quant!r}]"
        + """
for quant in quants:
    with quiet(): model, tok = load_model("data/tiny-base", quant=quant, backend="unsloth")
    assert remembered(model).backend == "unsloth"
    plan = drop(model, "0,7")
    before, expect, facts = model(ids, use_cache=False).logits, handed_through(model, plan), model.config.to_dict()
    with skipping(model, plan):
        assert torch.equal(model(ids, use_cache=False).logits, expect) and torch.equal(greedy(model, True), greedy(model, False))
    assert torch.equal(model(ids, use_cache=False).logits, before) and model.config.to_dict() == facts
    apply_plan(model, plan)
    assert torch.equal(model(ids, use_cache=False).logits, expect) and torch.equal(greedy(model, True), greedy(model, False))

    lora = adapted(model)
    expect = lora(ids).logits
    save_adapter(lora, tok, out/f"adapter-{quant}", "data/tiny-base", plan)
    with quiet(): again, _ = load_for_inference(out/f"adapter-{quant}", quant=quant, backend="unsloth")
    assert n_layers(again) == 10 and torch.allclose(again(ids).logits, expect, atol=1e-4)
    if quant is None:
        with quiet(): merged, _ = load_model(save_cut(merge_lora(lora), tok, out/"merged"), backend="transformers")
        assert torch.allclose(merged(ids).logits, expect, atol=1e-4)
""",
        tmp_path,
    )


@pytest.mark.slow
def test_unsloth_merge_that_reads_the_weights_again(tmp_path):
    """`merge_and_overwrite_lora`, which unsloth's `save_pretrained_merged` calls on a GPU: with the whole base's name, adapter i goes into the original layer i.
    A model cut by `apply_plan` is refused, one cut by `save_cut` is merged right. unsloth's CPU merge works in memory; 2026.10.9 with peft 0.21.2 writes the adapters unmerged."""
    unsloth_process(
        """
import unsloth
from unsloth_zoo.saving_utils import merge_and_overwrite_lora
from transformers import AutoModelForCausalLM

def by_shards(lora, folder):
    with quiet(): merge_and_overwrite_lora(lambda name, load_in_4bit=False: name, lora, tok, save_directory=str(folder))
    with quiet(): return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

with quiet(): model, tok = load_model("data/tiny-base", backend="unsloth")
whole, plan = model.config._name_or_path, drop(model, 7)
lora = adapted(apply_plan(model, plan))
expect = lora(ids).logits
close = lambda m: torch.allclose(m(ids).logits.softmax(-1), expect.softmax(-1), atol=.02)   # merged in 16 bits

with quiet(): lora.save_pretrained_merged(str(out/"memory"), tok)
with quiet(): print("in memory, on a CPU:", "right" if close(AutoModelForCausalLM.from_pretrained(out/"memory", dtype=torch.float32).eval()) else "wrong")

try: by_shards(lora, out/"marked")
except Exception as e: print("refused:", str(e)[:300])
else: raise AssertionError("merged from " + lora.config._name_or_path)

lora.config._name_or_path = whole                    # as it would be without the mark
wrong = by_shards(lora, out/"wrong")
print("whole base:", n_layers(wrong), "layers by its configuration,", "right" if close(wrong) else "wrong")
assert not close(wrong)

with quiet(): model, tok = load_model("data/tiny-base", backend="unsloth")
save_cut(apply_plan(model, plan), tok, out/"cut")
lora = adapted(model)
expect = lora(ids).logits
right = by_shards(lora, out/"right")
assert n_layers(right) == 11 and close(right)
""",
        tmp_path,
    )


def test_per_layer_facts_are_known():
    "Every list that gets shorter when a causal model of transformers is made less deep is named in `surgery`; lists of token ids and the like are not."
    import logging
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from finetune_kit.architecture import FIRST_LAYERS, LAST_LAYERS, LAYER_NUMBERS, PER_LAYER

    logging.disable(logging.WARNING)
    shrinks, names = set(), set()
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            deep, flat = (
                vars(CONFIG_MAPPING[kind](num_hidden_layers=n).get_text_config()) for n in (12, 8)
            )
        except Exception:
            continue  # a few cannot be made from the depth alone
        names |= set(deep)
        shrinks |= {
            k
            for k, v in deep.items()
            if isinstance(v, (list, tuple)) and len(v) != len(flat.get(k) or [])
        }
    logging.disable(logging.NOTSET)
    assert {"layer_types", "mlp_layer_types", "no_rope_layers"} <= shrinks and shrinks <= {
        *PER_LAYER,
        *LAYER_NUMBERS,
    }
    assert not {"eos_token_id", "architectures"} & {*PER_LAYER, *LAYER_NUMBERS}
    assert {*LAYER_NUMBERS, *FIRST_LAYERS, *LAST_LAYERS} <= names, "a name that no model has"


def test_recipe_run_by_mergekit(tmp_path):
    "mergekit's own reading of the recipe gives the weights that `save_cut` gives. MERGEKIT: a Python that has it, where this one has not."
    import torch
    from safetensors.torch import load_file
    from finetune_kit.model import remembered, load_model
    from finetune_kit.plan import drop
    from finetune_kit.surgery import save_cut
    from finetune_kit.cutting import apply_plan
    from finetune_kit.recipes import mergekit_recipe

    python = os.environ.get("MERGEKIT", sys.executable)
    if subprocess.run([python, "-c", "import mergekit"], capture_output=True).returncode:
        pytest.skip("mergekit is not installed; MERGEKIT=/path/to/python names one that has it")
    model, tok = load_model("data/tiny-base", backend="transformers")
    plan = drop(model, "0,7-8")
    (tmp_path / "recipe.yaml").write_text(mergekit_recipe("data/tiny-base", plan))
    done = subprocess.run(
        [
            python,
            "-m",
            "mergekit.scripts.run_yaml",
            str(tmp_path / "recipe.yaml"),
            str(tmp_path / "merged"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    save_cut(apply_plan(model, plan), tok, tmp_path / "cut")
    ours, theirs = (load_model(tmp_path / d, backend="transformers")[0] for d in ("cut", "merged"))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert json.loads((tmp_path / "merged/config.json").read_text())["num_hidden_layers"] == len(
        plan.keep
    )


def test_recipe_has_the_documented_form():
    "mergekit's README: slices of sources with model and layer_range [first, one past the last], and a merge_method."
    import yaml
    from finetune_kit.plan import drop
    from finetune_kit.recipes import mergekit_recipe

    recipe = yaml.safe_load(mergekit_recipe("data/tiny-base", drop(12, "0,7-8")))
    assert set(recipe) == {"slices", "merge_method"} and recipe["merge_method"] == "passthrough"
    layers = []
    for s in recipe["slices"]:
        (source,) = s["sources"]
        assert set(s) == {"sources"} and set(source) == {"model", "layer_range"}
        layers += range(*source["layer_range"])
    assert layers == [1, 2, 3, 4, 5, 6, 9, 10, 11]
