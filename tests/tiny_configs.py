"""A tiny random model of every type that transformers offers as a causal language model.

`tiny` shrinks the config class's own defaults: sizes that many classes share are in `SIZES`, and what a class needs
beside them in `EXTRAS`. A hybrid keeps a layer of each kind that its defaults have. `build` makes the model and draws
its parameters anew, so that no branch, gate, gain or bias is at a value under which it does nothing.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LAYERS, WIDTH, HEADS, VOCABULARY, CONTEXT = 3, 64, 4, 260, 64

_NAMES: tuple[tuple[float, str], ...] = (
    (
        WIDTH,
        "hidden_size n_embd d_model emb_dim word_embed_proj_dim embedding_size embedding_dim lru_width"
        " attention_hidden_size input_size backbone_hidden_size out_hidden_size projection_dim",
    ),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks"),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"
        " attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads"
        " num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads linear_num_heads",
    ),
    (
        16,
        "head_dim d_head dim_head d_kv kv_channels attention_head_size swa_head_dim v_head_dim qk_nope_head_dim"
        " linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim hidden_size_per_layer_input"
        " laurel_rank gated_norm_rank hc_lowrank adapter_rank router_hidden_size"
        # Few of these would score many keys as exactly zero, and the order of equals depends on how many there are.
        " index_n_heads",
    ),
    (32, "kv_lora_rank q_lora_rank o_lora_rank"),
    (
        96,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner d_ff dff dim_ff ffn_hidden_size"
        " intermediate_size_mlp feed_forward_size dense_intermediate_size n_inner",
    ),
    (
        48,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"
        " shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size",
    ),
    (VOCABULARY, "vocab_size decoder_vocab_size vocab_size_per_layer_input"),
    (
        CONTEXT,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length"
        " max_target_positions max_source_positions",
    ),
    (
        8,
        "qk_rope_head_dim rotary_dim index_topk sliding_window sliding_window_size attention_chunk_size window_size"
        " attention_window_size local_attention mamba_d_state state_size ssm_state_size mamba_dt_rank time_step_rank"
        " mamba_chunk_size chunk_size rel_extent d_rel keep_window_size",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads"
        " num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts num_codebooks o_groups n_groups",
    ),
    (
        1,
        "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts encoder_layers"
        " num_encoder_layers first_k_dense_replace num_dense_layers",
    ),
    # Factors of one would hide where they are applied.
    (0.5, "residual_multiplier"),
    (2.0, "embedding_multiplier logits_scaling routed_scaling_factor"),
    (0.2, "attention_multiplier"),
    (0, "num_nextn_predict_layers num_mtp_layers"),
)
SIZES: dict[str, Any] = {name: value for value, names in _NAMES for name in names.split()}

_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_PLE = {
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 4,
    "eos_token_id": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_GEMMA4 = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "global_head_dim": 32}
_DRAFTER = _GEMMA4 | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_GEMMA3N = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [96] * 4,
    "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
}
_DOTS3 = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 24, "swa_kv_lora_rank": 24} | {
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 12,
    "swa_v_head_dim": 12,
    "head_dim": 32,
}
_LLAMA4 = {"moe_layers": [1, 2]}
_CONV = {"layer_types": ["conv", "full_attention", "conv"]}
EXTRAS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {
        "encoder_hash_byte_group_vocab": 100,
        "decoder_config": {"hidden_size_global": 64},
        "encoder_config": {"hidden_size_global": 64},
    },
    "cohere2_moe": {"mlp_layer_types": ["dense", "sparse", "sparse"], "prefix_dense_intermediate_size": 96},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 4.0}, "ffn_config": {"ffn_hidden_size": 96}},
    "deepseek_v2": {"num_experts_per_tok": 2, "head_dim": 8},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64, "mlp_layer_types": ["dense"] * 3},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": _DOTS3,
    "falcon_h1": {
        "lm_head_multiplier": 0.5,
        "mlp_multipliers": [0.7, 0.6],
        "key_multiplier": 0.5,
        "attention_out_multiplier": 0.8,
        "attention_in_multiplier": 1.2,
        "ssm_multipliers": [0.8, 0.9, 1.1, 1.2, 0.7],
        "ssm_in_multiplier": 1.1,
        "ssm_out_multiplier": 0.6,
    },
    "gemma2": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},  # at its defaults it would hardly show
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {
        "text_config": _GEMMA4
        | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}
        | {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True}
    },
    "gemma4_assistant": {"text_config": _DRAFTER | {"model_type": "gemma4_text"}, "backbone_hidden_size": 64},
    "gemma4_text": _GEMMA4
    | {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "use_double_wide_mlp": True,
    },
    "gemma4_unified": {
        "text_config": _GEMMA4,
        "vision_config": {"mm_embed_dim": 64, "mm_posemb_size": 8, "output_proj_dims": 64, "patch_size": 2},
    },
    "gemma4_unified_assistant": {
        "text_config": _DRAFTER | {"model_type": "gemma4_unified_text"},
        "backbone_hidden_size": 64,
    },
    "gemma4_unified_text": _GEMMA4,
    "glm_moe_dsa": {"indexer_types": ["full", "shared", "full"]},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granitemoehybrid": _HYBRID,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "inkling_text": {"logits_mup_width_multiplier": 2.0, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 3, "attn_layer_offset": 1},
    "laguna": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "num_attention_heads_per_layer": [4, 8, 4],
    },
    "lfm2": _CONV | {"block_multiple_of": 32},
    "lfm2_moe": _CONV,
    "llama4": {"text_config": _LLAMA4},
    "llama4_text": _LLAMA4,
    "longcat_flash": {"head_dim": 8, "n_routed_experts": 3, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "mellum": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "minimax": {
        "full_attn_alpha_factor": 1.5,
        "full_attn_beta_factor": 0.7,
        "linear_attn_alpha_factor": 1.3,
        "linear_attn_beta_factor": 0.8,
        "mlp_alpha_factor": 1.2,
        "mlp_beta_factor": 0.6,
    },
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": {"head_dim": 16},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen4_exp": {"text_config": _PLE},
    "qwen4_exp_text": _PLE,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 48],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 48},
    "roc_bert": {
        "pronunciation_vocab_size": 20,
        "shape_vocab_size": 20,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "rwkv": {"num_hidden_layers": 14},
    "vaultgemma": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding", "hybrid"], "sliding_window": 8},
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DECODER_ONLY: frozenset[str] = _words(
    """
    afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba beam biogpt bitnet bloom codegen cohere cohere2
    cohere2_moe cohere_compass_text ctrl cwm dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama
    doge dots1 dots3_note dots3_note_text emu3 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1
    falcon_mamba flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text
    gemma4_unified gemma4_unified_text git glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa got_ocr2 gpt-sw3 gpt2
    gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
    granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax
    inkling2_text inkling_text internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2
    lfm2_moe lfm3 llama llama4 llama4_text longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3 minimax
    minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral mllama modernbert-decoder moshi
    moss_transcribe_diarize mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt
    persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text
    qwen3_5_text qwen3_moe qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma rwkv seed_oss smollm3 solar_open
    stablelm starcoder2 vaultgemma xglm xlstm youtu zamba zamba2 zaya
    """
)
"""Causal language models that run on token ids alone, the text path of multi-modal ones among them."""

ENCODERS: frozenset[str] = _words(
    """
    bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
    roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod
    """
)
"""Encoders such as BERT, which attend to what came before alone if their config says so. `tiny` says so."""

DECODER_HALVES: frozenset[str] = _words(
    """
    bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr whisper
    """
)
"""The decoder of an encoder-decoder, run without what it would attend to across."""

OTHER: dict[str, str] = {
    "blt": "bytes are gathered into patches: encoder, global stack and decoder have streams of their own",
    "cpmant": "a prefix model: learned prompts come first, and attention within the text is in both directions",
    "gemma4_assistant": "a drafter: reads the states of the model it drafts for, not token ids",
    "gemma4_unified_assistant": "a drafter: reads the states of the model it drafts for, not token ids",
    "musicgen": "codes of music, several codebooks a step",
    "musicgen_melody": "codes of music, several codebooks a step",
    "reformer": "a reversible pair of streams; hashed attention, in which later tokens move what earlier ones attend to",
    "xlnet": "a permutation model: attention in both directions unless a permutation mask is given",
}
"""None of these, and why."""

UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its image tower is of the package timm; `gemma3n_text` is its text path",
    "gemma4_assistant": "its config has all layers share keys and values, which its text model refuses",
    "gemma4_unified_assistant": "its config has all layers share keys and values, which its text model refuses",
    "musicgen": "AutoModelForCausalLM hands it the whole config, where its class wants the decoder's",
    "musicgen_melody": "AutoModelForCausalLM hands it the whole config, where its class wants the decoder's",
}
"""Types of which `build` cannot make a model, and why."""


def tiny(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A config of this type with the sizes of `SIZES`, changed by the type's `EXTRAS` and what else is asked for."""
    extras = EXTRAS.get(model_type, {}) | changes
    if model_type in ENCODERS and model_type != "xlm":  # which calls it `causal`
        extras["is_decoder"] = True
    return shrunk(CONFIG_MAPPING[model_type], extras)


def shrunk(kind: type[PreTrainedConfig], extras: dict[str, Any]) -> PreTrainedConfig:
    """The defaults of a config class made small. A dict among the extras is of the sub-config of that name."""
    parts = {
        name: shrunk(_class_of(part, kind, name, extras), extras.get(name, {}))
        for name, part in kind.sub_configs.items()
        if not (name in extras and extras[name] is None)
    }
    plain = {
        name: value
        for name, value in extras.items()
        if (name != "model_type" and name not in kind.sub_configs) or value is None
    }
    try:
        default = kind()
    except StrictDataclassError:
        return kind(**parts, **plain)
    fields = {field.name for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for name in fields:
        old = _value(default, name)
        if name == "num_key_value_heads" and "kv_lora_rank" in fields:
            values[name] = HEADS  # the heads share latent keys and values: there are no fewer of them
        elif name in SIZES and old is not None and not isinstance(old, list):
            values[name] = SIZES[name]
        elif name.endswith("_token_id") and (isinstance(old, list) or (isinstance(old, int) and old >= VOCABULARY)):
            values[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, 3)
        elif ("dropout" in name or "pdrop" in name or "layerdrop" in name) and isinstance(old, float):
            values[name] = 0.0
        elif name == "rope_parameters" and isinstance(old, dict):
            values[name] = _shorter(old)
    values |= _layer_lists(default, fields)
    return kind(**(values | parts | plain))


def _value(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # what differs between layers cannot be asked for as if it did not
        return vars(config).get(name)


def _shorter(rope: dict[str, Any]) -> dict[str, Any]:
    """Parameters of rotary positions, for a model trained on half of `CONTEXT` if they stretch a shorter one's."""
    return {
        key: _shorter(value) if isinstance(value, dict) else CONTEXT // 2 if key.startswith("original_max") else value
        for key, value in rope.items()
    }


def _class_of(part: type[PreTrainedConfig], kind: type[PreTrainedConfig], name: str, extras: dict[str, Any]) -> Any:
    """The class of a sub-config: its parent's default decides where the parent leaves it open."""
    if part.__name__ != "AutoConfig":
        return part
    named = extras.get(name, {}).get("model_type")
    return CONFIG_MAPPING[named] if named else type(getattr(kind(), name))


def _layer_lists(default: PreTrainedConfig, fields: set[str]) -> dict[str, Any]:
    """Lists with one entry per layer, and the number of layers: one layer of each kind that the defaults have."""
    count = next((_value(default, name) for name in SIZES if SIZES[name] == LAYERS and name in fields), None)
    lists = {
        name: value
        for name in sorted(fields)
        if isinstance(value := _value(default, name), list)
        and count
        and len(value) == count
        and count > 1
        and value != list(range(count))  # the numbers of some layers, which happen to be all
    }
    if not lists:
        return {}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))
    kinds = [kinds[i % len(kinds)] for i in range(max(LAYERS, len(kinds)))]
    sizes = {name: len(kinds) for name in SIZES if SIZES[name] == LAYERS and name in fields}
    return sizes | {name: list(column) for name, column in zip(lists, zip(*kinds, strict=True), strict=True)}


def build(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model in float32 and evaluation mode, whose parameters depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny(model_type, **changes), dtype=torch.float32).eval()
        scramble(model)
    return model.requires_grad_(False)


@torch.no_grad()
def scramble(model: nn.Module) -> None:
    """Draw every parameter anew: matrices at the scale of their width, all others around the value they have."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                _draw(module, name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            if "bias" in name and buffer.is_floating_point() and not buffer.any():
                buffer.copy_(0.1 * torch.randn_like(buffer))  # what balances experts starts at zero
            elif name == "layer_scalar":
                buffer.mul_(0.8)  # a factor of the stream, which starts at one


def _draw(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    noise = torch.randn_like(parameter)
    long = [size for size in parameter.shape if size > 1]
    if any(part in name for part in RECURRENT) or len(long) < 2:
        parameter.add_(noise, alpha=0.3 if not parameter.any() and "bias" not in name else 0.1)
    elif isinstance(module, nn.Embedding):
        parameter.copy_(0.5 * noise)
    elif isinstance(module, nn.Linear):
        parameter.copy_(noise / math.sqrt(parameter.shape[1]))
    else:  # experts, convolutions and matrices that are multiplied by hand: which way round is unknown
        parameter.copy_(noise / (long[-1] * long[-2]) ** 0.25)


RECURRENT = ("A_log", "dt_", "time_", "decay")
"""Parts of the names of a recurrence's parameters, which must stay near their values for its states to stay finite."""
