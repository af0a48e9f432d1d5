"""
Types of models that differ in what the kit must get right: each is exact, or refused in words.

All types, and the page of the guide: `make architectures`.
"""

import logging

import pytest
import tiny_types
from architecture_checks import CHECKS, Cell, outcome

# What is different about each
TYPES = dict(
    llama="the plain case",
    qwen3_moe="experts in one tensor, and a dense first layer",
    gpt_oss="experts in one tensor, attention sinks, sliding windows",
    granite="scales of residuals, attention and logits",
    cohere2="attention and MLP side by side; scaled logits",
    gemma3_text="two rotary bases, four norms a layer",
    gemma3n_text="several residual streams; keys and values of earlier layers",
    gemma4_text="facts of each layer behind the configuration; shared keys and values",
    olmo2="norms after attention and MLP",
    smollm3="layers without positions",
    llama4_text="chunked attention; dense and sparse layers in turn",
    glm4_moe="dense layers first",
    deepseek_v3="keys and values from a low rank; groups of experts",
    minicpm3="scales by depth and width",
    diffllama="a constant of each layer by its place",
    qwen3_next="linear and full attention",
    lfm2="convolutions between attention layers",
    jamba="Mamba, attention and experts by period",
    falcon_h1="attention and Mamba side by side",
    nemotron_h="one mixer a layer, of four kinds",
    mamba2="no attention at all",
    bamba="attention layers by their numbers",
    zamba2="one attention layer's weights in several places",
    recurrent_gemma="a pattern of blocks repeated",
    bloom="positions as a bias of attention",
    opt="learned positions with an offset; layers in a decoder",
    phi="one norm a layer; a bias in the head",
    gpt_neox="attention and MLP side by side",
)
# Parts of the reasons that a type may be refused for
REASONS = (
    "reads keys and values of layer",
    "would load as another model",
    "share weights with each other",
    "no attention of their own",
    "no mlp of their own",
    "are not all that it adds",
    "in one walk through its layers",
    "leave something for later layers",
    "without its attention or its MLP",
    "GGUF",
    "LoRA",
)


@pytest.fixture(autouse=True)
def no_messages():
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def fault(column: str, cell: Cell) -> str:
    "What must not be, in words; empty where all is well."
    if cell.is_fault:
        return f"{column}: {cell}"
    if cell.kind == "refused" and not any(reason in cell.text for reason in REASONS):
        return f"{column}: refused for a reason that is not expected: {cell.text}"
    return ""


@pytest.mark.parametrize("model_type", TYPES)
def test_a_type_is_exact_or_refused(model_type):
    faults = [fault(column, outcome(column, model_type)) for column in CHECKS]
    faults = [text for text in faults if text]
    assert not faults, f"{model_type} ({TYPES[model_type]}): " + "; ".join(faults)


def test_most_types_can_be_tiny():
    types = tiny_types.decoder_types()
    assert set(TYPES) <= set(types)
    assert len(types) >= 100  # how many transformers has differs from version to version
    for model_type in ("llama", "gpt2", "qwen3_5", "mamba"):
        config = tiny_types.tiny_config(model_type).get_text_config(decoder=True)
        assert config.num_hidden_layers == tiny_types.LAYERS
        assert config.vocab_size == tiny_types.VOCABULARY
