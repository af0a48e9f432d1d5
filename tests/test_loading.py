"""
No model has a random weight: what does not fit is refused by every loader, with what to do.

The loaders are `load_model` (transformers, and unsloth in a process of its own), `stream_model` and
`load_for_inference`; what they refuse is the same.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    GPT2Config,
    GPT2Model,
    GPTNeoConfig,
    LlamaConfig,
    LlamaModel,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
    T5Config,
)

from finetune_kit.core import (
    FineTuneError,
    IncompatibleConfigError,
    ModelLoadError,
    UnsupportedModelError,
)
from finetune_kit.logs import quiet
from finetune_kit.lora import add_lora
from finetune_kit.model import check_weights, load_model, load_tokenizer, model_config
from finetune_kit.plan import drop
from finetune_kit.stream import stream_model
from finetune_kit.surgery import PLAN_FILE, apply_plan, load_for_inference, save_adapter

BASE = ROOT / "data/tiny-base"
SMALL = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def load(path, **options):
    with quiet():
        return load_model(path, backend="transformers", device="cpu", **options)[0]


def change_weights(folder, change):
    file = folder / "model.safetensors"
    tensors = change(load_file(file))
    file.unlink()
    save_file(tensors, file, metadata=dict(format="pt"))


def change_json(file, **changes):
    content = json.loads(file.read_text()) | changes
    content = {name: value for name, value in content.items() if value is not None}
    file.write_text(json.dumps(content))


@pytest.fixture
def base(tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    return tmp_path / "base"


def without_layer(layer):
    return lambda tensors: {n: t for n, t in tensors.items() if f".layers.{layer}." not in n}


def of_another_model(tensors):
    return {name.replace("model.", "net."): tensor for name, tensor in tensors.items()}


def reshaped(tensors):
    return tensors | {"model.layers.3.mlp.up_proj.weight": torch.ones(100, 128)}


UNFIT = {
    "gap": (without_layer(2), {}, "9 weights are missing, 'model.layers.2.input_layernorm.weight'"),
    "count is 12, 11 stored": (without_layer(11), {}, "9 weights are missing, 'model.layers.11."),
    "count is 10, 11 stored": (
        without_layer(11),
        dict(num_hidden_layers=10),
        "9 stored weights belong to no layer, 'model.layers.10.",
    ),
    "other names": (of_another_model, {}, "110 stored weights belong to no layer, 'net.embed"),
    "another shape": (reshaped, {}, r"up_proj.weight' first \(\[100, 128\], not \[384, 128\]"),
}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.parametrize(
    "loader", [load, stream_model, lambda path: load(path, quant="4bit"), load_for_inference]
)
def test_weights_that_do_not_fit(base, name, loader):
    change, config_changes, message = UNFIT[name]
    change_weights(base, change)
    change_json(base / "config.json", **config_changes)
    with pytest.raises(ModelLoadError, match=message):
        loader(base)


BY_UNSLOTH = """
import sys
from finetune_kit.core import ModelLoadError
from finetune_kit.model import load_model, remembered

model, _ = load_model("data/tiny-base", backend="unsloth")
assert remembered(model).backend == "unsloth"
for quant in (None, "4bit"):
    try:
        load_model(sys.argv[1], quant=quant, backend="unsloth")
    except ModelLoadError as e:
        assert "9 weights are missing" in str(e), e
    else:
        raise AssertionError(quant)
"""


def test_unsloth_too(base):
    pytest.importorskip("unsloth")
    change_weights(base, without_layer(2))
    command = [sys.executable, "-c", BY_UNSLOTH, str(base)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_stored_quantized(base, tmp_path):
    "Loaded as stored, though `quant` is not given; a gap is found, as in plain weights."
    model = load(BASE, quant="8bit")
    folder = tmp_path / "packed"
    model.save_pretrained(folder)
    load_tokenizer(BASE).save_pretrained(folder)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(load(folder)(ids).logits, model(ids).logits)
    change_weights(folder, without_layer(2))
    with pytest.raises(ModelLoadError, match="9 weights are missing"):
        load(folder)
    with pytest.raises(UnsupportedModelError, match="stored quantised"):
        stream_model(folder)


def saved(folder, model, change=lambda tensors: tensors):
    model.save_pretrained(folder)
    change_weights(folder, change)
    return folder


def add(**tensors):
    return lambda stored: stored | {name.replace("__", "."): t for name, t in tensors.items()}


def test_what_may_differ(tmp_path):
    "Tied heads, bodies without their prefix, old buffers, shards: none is a false alarm."
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96, n_positions=16)
    old_gpt2 = add(h__0__attn__bias=torch.ones(16, 16), h__0__attn__masked_bias=torch.tensor(-1e4))
    check_weights(saved(tmp_path / "gpt2", GPT2Model(gpt2), old_gpt2))

    tied = LlamaConfig(**SMALL, tie_word_embeddings=True)
    inv_freq = add(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    check_weights(saved(tmp_path / "tied body", LlamaModel(tied)))
    check_weights(saved(tmp_path / "tied", AutoModelForCausalLM.from_config(tied), inv_freq))
    untied = LlamaConfig(**SMALL)
    with pytest.raises(ModelLoadError, match=r"1 weights are missing, 'lm_head.weight'"):
        check_weights(saved(tmp_path / "untied body", LlamaModel(untied)))

    neo = GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        vocab_size=96,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=16,
    )
    buffers = {
        "transformer.h.0.attn.attention.bias": torch.ones(1, 1, 16, 16),
        "transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9),
    }
    model = AutoModelForCausalLM.from_config(neo)
    check_weights(saved(tmp_path / "neo", model, lambda stored: stored | buffers))

    shards = tmp_path / "shards"
    AutoModelForCausalLM.from_config(untied).save_pretrained(shards, max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    check_weights(shards)


@pytest.mark.parametrize("config_class", [MixtralConfig, Qwen3MoeConfig, OlmoeConfig])
def test_experts_stored_one_by_one(tmp_path, config_class):
    config = config_class(**SMALL)
    for name in ("num_experts", "num_local_experts"):
        if hasattr(config, name):
            setattr(config, name, 4)
    config.update(dict(moe_intermediate_size=16, num_experts_per_tok=2))
    model = AutoModelForCausalLM.from_config(config)
    folder = saved(tmp_path / "moe", model)
    names = list(load_file(folder / "model.safetensors"))
    assert any(".experts.3." in name for name in names)
    check_weights(folder)
    change_weights(folder, lambda stored: {n: t for n, t in stored.items() if ".1." not in n})
    with pytest.raises(ModelLoadError, match=r"experts|missing"):
        check_weights(folder)


def written(folder, files=(), **config):
    folder.mkdir(exist_ok=True)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    for file in files:
        (folder / file).touch()
    return folder


OWN_CODE = dict(AutoConfig="own.OwnConfig", AutoModelForCausalLM="own.OwnModel")
BAD_INPUT = {
    "encoder": (BertConfig().to_dict(), (), UnsupportedModelError, "bert is an encoder"),
    "T5": (T5Config().to_dict(), (), UnsupportedModelError, "t5 is an encoder with a decoder"),
    "BART": (BartConfig().to_dict(), (), UnsupportedModelError, "an encoder with a decoder"),
    "no language": (dict(model_type="vit"), (), UnsupportedModelError, "no causal language model"),
    "newer": (dict(model_type="llama99"), (), ModelLoadError, "'llama99', unknown to transformers"),
    "own code": (
        dict(model_type="own", auto_map=OWN_CODE),
        (),
        ModelLoadError,
        "set trust_remote_code=True if you trust the code",
    ),
    "no type": (dict(hidden_size=8), (), ModelLoadError, "model_type None"),
    "pickle": (
        LlamaConfig(**SMALL).to_dict(),
        ("pytorch_model.bin",),
        ModelLoadError,
        "holds pytorch_model.bin and no safetensors",
    ),
    "no weights": (LlamaConfig(**SMALL).to_dict(), (), ModelLoadError, "and no weights"),
    "GGUF": ({}, ("model.Q4_K_M.gguf",), ModelLoadError, "holds model.Q4_K_M.gguf"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, name):
    config, files, error, message = BAD_INPUT[name]
    folder = written(tmp_path / "model", files, **config)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks at the terminal"))
    with pytest.raises(error, match=message) as caught:
        load(folder)
    assert isinstance(caught.value, FineTuneError)
    text = str(caught.value)
    assert "\n" not in text and len(text.replace(str(folder), "folder")) < 250


def test_a_decoder_of_an_encoder_type(tmp_path):
    config = BertConfig(is_decoder=True).to_dict()
    assert model_config(written(tmp_path / "bert", **config)).is_decoder


def test_tokenizer_does_not_ask(base, monkeypatch):
    "A tokenizer with code of its own is refused, without a question."
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks at the terminal"))
    auto_map = dict(AutoTokenizer=["own.OwnTokenizer", None])
    change_json(base / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="OwnTokenizer")
    with pytest.raises(ModelLoadError, match="set trust_remote_code=True if you trust"):
        load_tokenizer(base)


PLAN = drop(12, 7)
ids = torch.arange(3, 15)[None]


@pytest.fixture
def adapter(tmp_path):
    "(folder, its logits)"
    model, tokenizer = load_model(BASE, backend="transformers", device="cpu")
    lora = add_lora(apply_plan(model, PLAN), r=2)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05
    folder = save_adapter(lora, tokenizer, tmp_path / "adapter", BASE, PLAN)
    with torch.no_grad():
        return folder, lora.eval()(ids).logits


def load_adapter(folder):
    return load_for_inference(folder, backend="transformers", device="cpu")[0]


def test_an_adapter_and_its_plan(adapter):
    folder, expected = adapter
    with torch.no_grad():
        assert torch.equal(load_adapter(folder)(ids).logits, expected)
    file = folder / PLAN_FILE
    original = file.read_text()
    change_json(file, keep=drop(12, 3).keep)
    with pytest.raises(IncompatibleConfigError, match="was changed after it was saved: keep="):
        load_adapter(folder)

    file.write_text(original)
    change_json(file, digest=None, weights=None)
    with torch.no_grad():
        assert torch.equal(load_adapter(folder)(ids).logits, expected)
    change_json(file, keep=drop(12, "3,7").keep)
    with pytest.raises(ModelLoadError, match=r"do not fit the 10 layers.*of the file"):
        load_adapter(folder)
    change_json(file, keep=list(range(12)))
    with pytest.raises(ModelLoadError, match=r"do not fit the 12 layers.*are not in the file"):
        load_adapter(folder)


def test_swapped_adapter_weights(adapter):
    folder, _ = adapter
    weights = folder / "adapter_model.safetensors"
    tensors = {name: tensor * 2 for name, tensor in load_file(weights).items()}
    weights.unlink()
    save_file(tensors, weights)
    with pytest.raises(ModelLoadError, match="is not the file that was saved with"):
        load_adapter(folder)


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["q_proj"], layers_to_transform=[1, 4]),
        dict(target_modules=[], target_parameters=["mlp.up_proj.weight"]),
        dict(target_modules=["v_proj"], modules_to_save=["lm_head"]),
        dict(target_modules=["embed_tokens", "q_proj"]),
    ],
)
def test_adapters_of_some_parts(tmp_path, options):
    model, tokenizer = load_model(BASE, backend="transformers", device="cpu")
    lora = get_peft_model(apply_plan(model, PLAN), LoraConfig(r=2, **options)).eval()
    for parameter in lora.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
    save_adapter(lora, tokenizer, tmp_path / "adapter", BASE, PLAN)
    with torch.no_grad():
        assert torch.equal(load_adapter(tmp_path / "adapter")(ids).logits, lora(ids).logits)
