"""
A tiny random model of any causal language model type that transformers has.

The defaults of a configuration's class are shrunk by what its values mean: sizes, counts,
lists with an entry a layer. Kinds of layers, ties and scales stay as the class has them.
"""

import warnings

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 6
VOCABULARY = 96
WINDOW = 4  # tokens: rows of a dozen are longer
POSITIONS = 128
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
OTHER_SPECIAL = VOCABULARY - 1  # the place of an image, …

# For each meaning: the value, and the names that configurations have for it
MEANINGS = {
    "layers": (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers encoder_layers"
        " num_decoder_layers num_encoder_layers num_layers_per_stack",
    ),
    "tokens that are known": (
        VOCABULARY,
        "vocab_size vocab_size_per_layer_input decoder_vocab_size audio_vocab_size"
        " ngram_vocab_size_base encoder_hash_byte_group_vocab",
    ),
    "width": (
        32,
        "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim"
        " attention_hidden_size lru_width backbone_hidden_size input_embedding_size"
        " output_embedding_size dim_model_base out_hidden_size image_size",
    ),
    "width of an MLP": (
        48,
        "intermediate_size intermediate_size_mlp dense_intermediate_size n_inner d_inner dff"
        " dim_ff ffn_dim ffn_hidden_size feed_forward_size decoder_ffn_dim encoder_ffn_dim",
    ),
    "width of an expert": (
        16,
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"
        " moe_shared_expert_intermediate_size expert_ffn_hidden_size router_hidden_size"
        " projection_dim ple_embed_dim q_lora_rank o_lora_rank rel_extent",
    ),
    "heads, and experts": (
        4,
        "num_attention_heads num_heads n_head n_heads attention_heads decoder_attention_heads"
        " encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads"
        " swa_num_attention_heads linear_num_heads num_experts num_local_experts"
        " n_routed_experts moe_num_experts split_ngram_parts qk_rope_head_dim rotary_dim"
        " index_topk index_block_size lora_rank adapter_rank gated_norm_rank d_rel mamba_dt_rank"
        " time_step_rank prompt_length prompt_types segment_types patch_size",
    ),
    "heads of a smaller kind, and experts in use": (
        2,
        "linear_num_key_heads linear_num_value_heads index_n_heads num_experts_per_tok"
        " num_experts_per_token moe_topk moe_k zero_expert_num n_group n_groups o_groups"
        " num_query_groups n_mamba_heads index_topk_blocks heads_per_ngram"
        " first_k_dense_replace depth",
    ),
    "groups in use": (1, "topk_group num_mem_blocks n_shared_experts num_shared_experts"),
    "width of a head": (
        8,
        "head_dim v_head_dim qk_nope_head_dim index_head_dim swa_head_dim global_head_dim"
        " linear_key_head_dim linear_value_head_dim linear_head_dim attention_head_dim kv_channels"
        " attention_head_size dim_head d_head kv_lora_rank laurel_rank hc_lowrank"
        " hidden_size_per_layer_input query_pre_attn_scalar pronunciation_embed_dim"
        " shape_embed_dim mamba_d_state mamba_d_head mamba_head_dim mamba_headdim mamba_n_heads"
        " mamba_num_heads ssm_state_size state_size num_centroids block_multiple_of",
    ),
    "nope and rope together": (12, "qk_head_dim"),
    "window": (
        WINDOW,
        "sliding_window sliding_window_size window_size attention_chunk_size block_size",
    ),
    "window of both sides, and chunk": (
        2 * WINDOW,
        "local_attention attention_window_size keep_window_size mamba_chunk_size chunk_size"
        " floor_scale",
    ),
    "positions": (
        POSITIONS,
        "max_position_embeddings max_position_embedding n_positions n_ctx max_seq_len"
        " context_length model_max_length max_source_positions max_target_positions"
        " original_max_position_embeddings mamba_d_ssm",
    ),
}
SIZES = {name: size for size, names in MEANINGS.values() for name in names.split()}
LAYER_COUNTS = MEANINGS["layers"][1].split()
HEAD_COUNTS = ("num_attention_heads", "num_heads", "swa_num_attention_heads")
KEY_VALUE_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "swa_num_key_value_heads",
    "num_global_key_value_heads",
)
# Lists of layers' numbers
PLACES = ("moe_layers", "full_attn_idxs", "cross_attention_layers", "hybrid_layer_ids")

LINEAR_AND_FULL = ["linear_attention", "linear_attention", "full_attention"] * 2
SLIDING_AND_FULL = ["sliding_attention", "sliding_attention", "full_attention"] * 2
# What six layers would not show of the defaults; or what the defaults leave out, or derive
# from a size that is another now
HINTS: dict[str, dict] = {
    "deepseek_v2": dict(num_experts_per_tok=2, n_group=1),  # no default
    "deepseek_v3": dict(n_group=2),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),  # no default
    "ernie4_5_moe": dict(moe_layer_end_index=4),  # the last layer is dense
    "falcon_h1": dict(mamba_d_ssm=64),  # mamba_n_heads * mamba_d_head
    # The first layer of a kind is where later ones take keys and values from
    "gemma3n_text": dict(
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 3,
        activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
    ),
    "gemma4_text": dict(
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 3
    ),
    "gemma3_text": dict(layer_types=SLIDING_AND_FULL),
    "gpt_neo": dict(attention_types=[[["global", "local"], LAYERS // 2]]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention", "mamba"] * 2),
    "hunyuan_v1_dense": dict(head_dim=8),  # no default
    "hunyuan_v1_moe": dict(head_dim=8),
    "jamba": dict(attn_layer_period=3, attn_layer_offset=1),  # two layers with attention
    "lfm2": dict(layer_types=["conv", "full_attention", "conv"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention", "conv"] * 2),  # no default
    "longcat_flash": dict(num_layers=LAYERS // 2),  # each holds two attentions and two MLPs
    "mamba2": dict(num_heads=8),  # times head_dim: twice the width
    "bamba": dict(attn_layer_indices=[1, 4]),  # no layer with attention by default
    "ministral": dict(head_dim=8, layer_types=SLIDING_AND_FULL),
    "nemotron": dict(head_dim=8, num_key_value_heads=2),  # no default
    "nemotron_h": dict(
        layers_block_type=[
            *("linear_attention", "moe", "full_attention"),
            *("mlp", "linear_attention", "full_attention"),
        ]
    ),
    "olmo3": dict(layer_types=SLIDING_AND_FULL),
    "olmo_hybrid": dict(layer_types=LINEAR_AND_FULL),
    "qwen2": dict(use_sliding_window=True, max_window_layers=3),
    "qwen2_moe": dict(mlp_only_layers=[0]),
    "qwen3_moe": dict(mlp_only_layers=[0]),
    "qwen3_next": dict(mlp_only_layers=[0], layer_types=LINEAR_AND_FULL),
    "qwen3_5_text": dict(layer_types=LINEAR_AND_FULL),
    "qwen3_5_moe_text": dict(layer_types=LINEAR_AND_FULL),
    "llama4_text": dict(interleave_moe_layer_step=2, moe_layers=None),
    # Two attention layers with one set of weights; they see two states side by side
    "zamba": dict(
        layers_block_type=["linear_attention", "hybrid", "linear_attention"] * 2,
        attention_hidden_size=64,
        attention_head_dim=16,
    ),
    "zamba2": dict(
        layers_block_type=["linear_attention", "hybrid", "linear_attention"] * 2,
        hybrid_layer_ids=[1, 4],
        attention_hidden_size=64,
        attention_head_dim=16,
        n_mamba_heads=8,
        num_key_value_heads=4,
    ),
}

# Encoders that can be told to decode, and the decoders of models that translate or transcribe
ENCODERS = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert"
    " roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
)
SEQUENCE_TO_SEQUENCE = (
    "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet"
    " trocr whisper musicgen musicgen_melody moshi"
)
# What cannot be built tiny from its class's defaults, and why
NOT_TINY = dict(
    blt="its patches are made by a second model of fixed width",
    cohere_compass_text="its defaults have no rotary angles for full attention",
    dbrx="its parts refuse what their own to_dict gives",
    gemma3n="its image encoder needs timm",
    gemma4_assistant="it decodes on the states of another model",
    gemma4_unified_assistant="it decodes on the states of another model",
    qwen4_exp="its defaults lack the indexer's budget",
    qwen4_exp_text="its defaults lack the indexer's budget",
    reformer="its positions are a grid of the row's exact length",
)


def decoder_types() -> list[str]:
    "The types of causal language models in transformers that are decoders, and can be tiny."
    others = {*ENCODERS.split(), *SEQUENCE_TO_SEQUENCE.split(), *NOT_TINY}
    known = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING]
    return sorted(set(known) - others)


def _small_count(config, name, value):
    "Heads of keys and values: as many as others where they are as many, else grouped."
    heads = [vars(config).get(heads) for heads in HEAD_COUNTS]
    return SIZES["num_attention_heads"] if value in heads else min(value, 2)


def _small_list(name, values, n_layers):
    "Of a list with an entry a layer the first ones; of one with layers' numbers the low ones."
    if name in PLACES:
        return [place for place in values if place < LAYERS]
    if len(values) != n_layers:
        return None
    values = [min(v, SIZES[name]) if name in SIZES else v for v in values]
    return (values * LAYERS)[:LAYERS]


def small_values(
    config,  # With the defaults of its class
) -> dict:  # The values that differ
    "A configuration's values, shrunk by their meaning; what is 0, None or small already stays."
    values = {}
    n_layers = getattr(config, "num_hidden_layers", None)
    facts = vars(config)
    for name, value in facts.items():
        is_count = isinstance(value, int) and not isinstance(value, bool)
        if name in SPECIAL and value is not None:
            values[name] = SPECIAL[name]
        elif is_count and name.endswith(("_token_id", "_token_index")):
            values[name] = min(value, OTHER_SPECIAL)
        elif is_count and name in LAYER_COUNTS:
            values[name] = LAYERS
        elif is_count and name in KEY_VALUE_HEADS:
            values[name] = _small_count(config, name, value)
        elif is_count and name in SIZES:
            values[name] = min(value, SIZES[name])
        elif isinstance(value, float) and "drop" in name:
            values[name] = 0.0  # chance would hide a difference in training
        elif isinstance(value, (list, tuple)):
            shorter = _small_list(name, list(value), n_layers)
            if shorter is not None:
                values[name] = shorter
    if facts.get("qk_rope_head_dim") == facts.get("head_dim", 0):
        values["head_dim"] = SIZES["qk_rope_head_dim"]  # rotated alone: DeepSeek and its kin
    return values | HINTS.get(config.model_type, {})


def _parts(config) -> dict:
    "The configurations inside that of a wrapper, by name."
    return {name: part for name, part in vars(config).items() if hasattr(part, "get_text_config")}


def _small(config):
    values = small_values(config)
    for name, part in _parts(config).items():
        values[name] = _small(part).to_dict()
    return type(config)(**values)


def tiny_config(
    model_type: str,  # One of `decoder_types`, or of `CONFIG_MAPPING`
):
    "The smallest configuration of a type that still has what makes it different."
    with warnings.catch_warnings(action="ignore"):
        return _small(CONFIG_MAPPING[model_type]())


def tiny_of_type(
    model_type: str,  # As for `tiny_config`
    seed: int = 0,
):  # In eval mode, fp32
    "A random model. The noise is large, so that every layer, bias and scale matters."
    config = tiny_config(model_type)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn_like(weight) * 0.1
    return model
