"""Language models of many architectures, tiny and random, each against transformers' own forward pass on token ids.

docs/backbones.md has the table; `pytest -m "long or not long" tests/layers/test_families.py -s` prints its figures.
"""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel

from layers.backbone import Backbone, find_backbone
from layers.fast import choose_path
from tests.small_run import command_line, refusal, train

VOCAB = 600
SHAPE = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
SHAPE |= dict(max_position_embeddings=256)
GROUPED = SHAPE | dict(num_key_value_heads=2)
GPT = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256)
OPT = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48)
FALCON = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
DEEPSEEK = dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8)
DEEPSEEK |= SHAPE | dict(v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, topk_group=1)
DEEPSEEK |= dict(first_k_dense_replace=1)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
ALTERNATE = ["linear_attention", "full_attention"]

# Class of the configuration, what it says, and the path that is taken.
ODD = {
    "GPT-J": ("GPTJConfig", GPT | dict(rotary_dim=4), "fast"),
    "GPT-Neo, local attention over 12": (
        "GPTNeoConfig",
        dict(vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])
        | dict(window_size=12, max_position_embeddings=256),
        "plain",
    ),
    "Bloom": ("BloomConfig", dict(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), "plain"),
    "Falcon, alibi": ("FalconConfig", FALCON | dict(alibi=True, multi_query=False, parallel_attn=False), "plain"),
    "MPT": ("MptConfig", dict(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=256), "plain"),
    "OPT-350m, narrow embeddings": ("OPTConfig", OPT | dict(word_embed_proj_dim=16, do_layer_norm_before=False), "fast"),
    "Mistral, window of 12": ("MistralConfig", GROUPED | dict(sliding_window=12), "plain"),
    "Gemma 2, capped scores": ("Gemma2Config", GROUPED | dict(head_dim=8, query_pre_attn_scalar=8), "plain"),
    "GPT-OSS, attention sinks": (
        "GptOssConfig",
        GROUPED | dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2),
        "plain",
    ),
    "Llama 4, chunked attention": (
        "Llama4TextConfig",
        GROUPED | dict(head_dim=8, num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=12),
        "plain",
    ),
    "DeepSeek-V3": ("DeepseekV3Config", DEEPSEEK | dict(n_group=2), "plain"),
    "Qwen3-Next": (
        "Qwen3NextConfig",
        GROUPED | EXPERTS | LINEAR | dict(head_dim=16, shared_expert_intermediate_size=16, layer_types=ALTERNATE),
        "plain",
    ),
    "LFM2": ("Lfm2Config", GROUPED | dict(block_ff_dim=48, layer_types=["conv", "full_attention"]), "plain"),
    "Mamba": ("MambaConfig", dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2), "plain"),
    "RoBERTa": ("RobertaConfig", SHAPE, "plain"),
    "MPNet": ("MPNetConfig", SHAPE, "plain"),
    "Longformer": ("LongformerConfig", SHAPE | dict(attention_window=8), "plain"),
    "ALBERT, narrow embeddings": ("AlbertConfig", SHAPE | dict(embedding_size=16), "plain"),
    "MobileBERT": (
        "MobileBertConfig",
        SHAPE | dict(embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
        "plain",
    ),
}
OTHERS = {
    "Llama": ("LlamaConfig", GROUPED, "fast"),
    "Qwen2": ("Qwen2Config", GROUPED, "fast"),
    "Qwen3": ("Qwen3Config", GROUPED | dict(head_dim=16), "fast"),
    "Qwen3-MoE": ("Qwen3MoeConfig", GROUPED | EXPERTS | dict(head_dim=16), "fast"),
    "Mistral": ("MistralConfig", GROUPED, "fast"),
    "Mixtral": ("MixtralConfig", GROUPED | dict(num_local_experts=4), "fast"),
    "GPT-2": ("GPT2Config", GPT, "fast"),
    "GPT-BigCode": ("GPTBigCodeConfig", GPT, "fast"),
    "GPT-NeoX, Pythia": ("GPTNeoXConfig", SHAPE, "fast"),
    "CodeGen": ("CodeGenConfig", GPT | dict(rotary_dim=4), "fast"),
    "OPT": ("OPTConfig", OPT | dict(word_embed_proj_dim=32), "fast"),
    "Phi-2": ("PhiConfig", SHAPE, "fast"),
    "Phi-3": ("Phi3Config", GROUPED | dict(pad_token_id=0), "fast"),
    "Gemma": ("GemmaConfig", GROUPED | dict(head_dim=8), "fast"),
    "Gemma 3": ("Gemma3TextConfig", GROUPED | dict(head_dim=8, query_pre_attn_scalar=8), "fast"),
    "Falcon": ("FalconConfig", FALCON, "fast"),
    "StableLM": ("StableLmConfig", GROUPED, "fast"),
    "StarCoder2": ("Starcoder2Config", GROUPED, "fast"),
    "Cohere": ("CohereConfig", GROUPED, "fast"),
    "GLM": ("GlmConfig", GROUPED | dict(head_dim=8, pad_token_id=0), "fast"),
    "Granite": ("GraniteConfig", GROUPED, "fast"),
    "SmolLM3": ("SmolLM3Config", GROUPED | dict(pad_token_id=0), "fast"),
    "OLMo 2": ("Olmo2Config", GROUPED, "fast"),
    "EXAONE 4": ("Exaone4Config", GROUPED, "fast"),
    "ERNIE 4.5": ("Ernie4_5Config", GROUPED, "fast"),
    "BioGPT": ("BioGptConfig", SHAPE, "fast"),
    "DeepSeek-V2": ("DeepseekV2Config", DEEPSEEK | dict(n_group=1), "plain"),
    "Jamba": (
        "JambaConfig",
        GROUPED
        | dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2)
        | dict(use_mamba_kernels=False),
        "plain",
    ),
    "Falcon-H1": (
        "FalconH1Config",
        GROUPED
        | dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8),
        "plain",
    ),
    "Mamba 2": (
        "Mamba2Config",
        dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, head_dim=16, num_heads=4, n_groups=1, state_size=8)
        | dict(chunk_size=8),
        "plain",
    ),
    "RWKV": (
        "RwkvConfig",
        dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=256),
        "plain",
    ),
    "XLNet": ("XLNetConfig", dict(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48), "plain"),
    "BERT": ("BertConfig", SHAPE, "plain"),
    "XLM-RoBERTa": ("XLMRobertaConfig", SHAPE, "plain"),
    "CamemBERT": ("CamembertConfig", SHAPE, "plain"),
    "ELECTRA, narrow embeddings": ("ElectraConfig", SHAPE | dict(embedding_size=16), "plain"),
    "DistilBERT": (
        "DistilBertConfig",
        dict(vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=256),
        "plain",
    ),
    "DeBERTa-v2": (
        "DebertaV2Config",
        SHAPE | dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False),
        "plain",
    ),
    "ModernBERT, local attention over 8": ("ModernBertConfig", SHAPE | dict(pad_token_id=0, local_attention=8), "plain"),
}
FAMILIES = [pytest.param(*row, id=name) for name, row in ODD.items()]
FAMILIES += [pytest.param(*row, id=name, marks=pytest.mark.long) for name, row in OTHERS.items()]


WIDE = dict(vocab_size=4096, max_position_embeddings=1024)  # enough for the tokenizer and its prompts


def write_model(folder: Path, tokenizer: Path, kind: str, settings: dict) -> Path:
    """A folder as it is downloaded, with random weights that are large enough for an error to show."""
    torch.manual_seed(0)
    model = AutoModel.from_config(getattr(transformers, kind)(**settings))
    for name, tensor in model.named_parameters():
        if tensor.dim() > 1 or name.endswith("bias"):
            nn.init.normal_(tensor, std=0.3 if len(tensor) == VOCAB else 0.15)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    return folder


@pytest.mark.parametrize(("kind", "settings", "expected_path"), FAMILIES)
def test_either_path_is_transformers_own_forward_pass(
    kind: str, settings: dict, expected_path: str, backbones, tmp_path: Path, request
) -> None:
    folder = write_model(tmp_path / "model", backbones["qwen2"], kind, settings)
    info = find_backbone("AUTO", str(folder))
    backbone = Backbone(info, info.layers)
    ids = torch.randint(5, VOCAB, (2, 22), generator=torch.Generator().manual_seed(1))
    prefix, n, lengths, L = ids[0, :9].tolist(), 7, (7, 3), 6
    ids[1, :9] = ids[0, :9]
    random_state = torch.get_rng_state()
    path, _ = choose_path(backbone, prefix, n, L, fast=True)
    assert torch.equal(torch.get_rng_state(), random_state)  # or a run would train otherwise for having looked
    assert ("plain" if path == backbone.plain else "fast") == expected_path
    patches = backbone.token_embeddings(ids[:, -L:])  # (2, L, D)
    own = AutoModel.from_pretrained(folder).eval()
    results = []
    for run in (path, backbone.plain):
        x = patches.clone().requires_grad_()
        found = run(prefix, ids[:, 9:-L], torch.tensor(lengths), x)
        # Cubes: an RMSNorm leaves the sum of squares as it is, whose gradient would be rounding alone.
        results.append((found.detach(), *torch.autograd.grad(found.pow(3).sum(), x)))
    with torch.no_grad():
        sequences = [torch.cat([ids[i, : 9 + length], ids[i, -L:]])[None] for i, length in enumerate(lengths)]
        right = torch.cat([own(input_ids=sequence).last_hidden_state[:, -L:] for sequence in sequences])
    difference = ((results[0][0] - right).abs().max() / right.abs().max()).item()
    print(f"\n| {request.node.callspec.id} | {expected_path} | {difference:.1e} |")
    assert difference < 1e-5
    assert (results[0][1] - results[1][1]).norm() <= 1e-3 * results[1][1].norm()


def test_a_run_says_which_path_it_takes(backbones, tmp_path: Path, capsys) -> None:
    """ALBERT's layers are wider than its token embeddings, and a mask from both sides: trained, tested, forecast."""
    folder = write_model(tmp_path / "model", backbones["qwen2"], "AlbertConfig", ODD["ALBERT, narrow embeddings"][1] | WIDE)
    words = command_line(tmp_path, folder, llm_model="AUTO", max_iters=2, grad_checkpoint=True, do_predict=True)
    lines = train(words, capsys)
    assert any("; plain path (the fast path does" in line for line in lines), lines
    assert any(line.startswith("Test MSE") for line in lines)


def test_what_no_path_can_run_is_refused_before_the_data_are_read(backbones, tmp_path: Path, capsys) -> None:
    settings = {name: value for name, value in SHAPE.items() if name != "num_attention_heads"}
    folder = write_model(tmp_path / "model", backbones["qwen2"], "FNetConfig", settings)
    words = command_line(tmp_path, folder, llm_model="AUTO")
    (tmp_path / "series.csv").write_text("no table")
    assert "got a model of type fnet, expected" in refusal(words, capsys)
