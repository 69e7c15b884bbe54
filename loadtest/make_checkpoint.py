#!/usr/bin/env python3
"""Makes a checkpoint of a real model's shape with random weights, for measuring speed and memory without a download.

    python3 loadtest/make_checkpoint.py --geometry llama-1b --dtype bf16 --out /tmp/llama-1b

Needs numpy. The folder is in Hugging Face format (config.json, safetensors, tokenizer.json, tokenizer_config.json with a
chat template, generation_config.json) and any server that loads such folders serves it. Weights are normal(0, 0.02), norms are
one, so nothing overflows; what it generates means nothing, and its end-of-sequence comes by chance (ask for ignore_eos).
The tokenizer is a byte-level BPE of 256 bytes and a few merges; the vocabulary's rest is filler that no text encodes to.
"""

import argparse
import json
from pathlib import Path

import numpy as np

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA31_ROPE = {**LLAMA3_ROPE, "factor": 8.0}

# hidden, layers, heads, kv heads, head_dim, ffn, vocabulary, tied, theta, scaling, longest sequence, epsilon
GEOMETRIES = {
    "llama-1b": dict(family="llama", hidden=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn=8192, vocab=128256, tied=True,
                     theta=500000.0, scaling=LLAMA3_ROPE, positions=131072, eps=1e-5),
    "llama-8b": dict(family="llama", hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256, tied=False,
                     theta=500000.0, scaling=LLAMA31_ROPE, positions=131072, eps=1e-5),
    # Multi-head attention: the shape in which the KV cache weighs most.
    "mha-12x1024": dict(family="llama", hidden=1024, layers=12, heads=16, kv_heads=16, head_dim=64, ffn=2816, vocab=32000, tied=False,
                        theta=10000.0, scaling=None, positions=65536, eps=1e-5),
    "qwen-0.5b": dict(family="qwen2", hidden=896, layers=24, heads=14, kv_heads=2, head_dim=64, ffn=4864, vocab=151936, tied=True,
                      theta=1000000.0, scaling=None, positions=32768, eps=1e-6),
    # For trying the tools themselves.
    "tiny": dict(family="llama", hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=256, vocab=1024, tied=False,
                 theta=500000.0, scaling={**LLAMA3_ROPE, "factor": 8.0, "original_max_position_embeddings": 64}, positions=8192, eps=1e-5),
}
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("e", "r"), ("o", "n"), ("Ġ", "o"), ("a", "n"), ("Ġa", "n")]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SHARD_BYTES = 4 << 30
DTYPES = {"bf16": ("BF16", "bfloat16", 2), "f16": ("F16", "float16", 2), "f32": ("F32", "float32", 4)}


def tensors(g, share=None):
    """(name, shape, kind) of every tensor, in the order they are stored. With a share, linear layers are products as WeLore stores
    them, whose two factors together have that share of the whole matrix's elements."""
    for name, shape, kind in whole(g):
        if share is None or not name.endswith("_proj.weight"):
            yield name, shape, kind
            continue
        path, (out, inputs) = name.removesuffix(".weight"), shape
        rank = max(1, round(share * out * inputs / (out + inputs)))
        yield path + ".U.weight", (out, rank), "weight"
        yield path + ".V.weight", (rank, inputs), "weight"


def whole(g):
    """The same with every matrix whole."""
    q, kv, hidden = g["heads"] * g["head_dim"], g["kv_heads"] * g["head_dim"], g["hidden"]
    yield "model.embed_tokens.weight", (g["vocab"], hidden), "weight"
    for i in range(g["layers"]):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (hidden,), "norm"
        for name, rows, cols in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            yield f"{layer}self_attn.{name}_proj.weight", (rows, cols), "weight"
            if g["family"] == "qwen2" and name != "o":
                yield f"{layer}self_attn.{name}_proj.bias", (rows,), "weight"
        yield layer + "post_attention_layernorm.weight", (hidden,), "norm"
        yield layer + "mlp.gate_proj.weight", (g["ffn"], hidden), "weight"
        yield layer + "mlp.up_proj.weight", (g["ffn"], hidden), "weight"
        yield layer + "mlp.down_proj.weight", (hidden, g["ffn"]), "weight"
    yield "model.norm.weight", (hidden,), "norm"
    if not g["tied"]:
        yield "lm_head.weight", (g["vocab"], hidden), "weight"


def encode(values, dtype):
    """float32 to little-endian bytes; bfloat16 rounds to nearest, ties to even."""
    if dtype == "f32":
        return values.tobytes()
    if dtype == "f16":
        return values.astype(np.float16).tobytes()
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def write_tensor(file, shape, kind, dtype, rng):
    count = int(np.prod(shape))
    for start in range(0, count, 1 << 22):
        n = min(1 << 22, count - start)
        values = np.ones(n, np.float32) if kind == "norm" else rng.standard_normal(n, np.float32) * np.float32(0.02)
        file.write(encode(values, dtype))


def write_weights(folder, g, dtype, seed, share=None):
    code, _, width = DTYPES[dtype]
    shards, total = [[]], 0
    for name, shape, kind in tensors(g, share):
        size = int(np.prod(shape)) * width
        if shards[-1] and sum(s for *_, s in shards[-1]) + size > SHARD_BYTES:
            shards.append([])
        shards[-1].append((name, shape, kind, size))
        total += size
    rng, weight_map = np.random.Generator(np.random.PCG64(seed)), {}
    for i, shard in enumerate(shards):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, shape, _, size in shard:
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + size]}
            weight_map[name] = file_name
            offset += size
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        with open(folder / file_name, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name, shape, kind, _ in shard:
                write_tensor(file, shape, kind, dtype, rng)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def byte_alphabet():
    """GPT-2's printable stand-in for every byte, in byte order."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in keep else chr(next(spare)) for b in range(256)]


def write_tokenizer(folder, vocab_size):
    pieces = byte_alphabet() + [a + b for a, b in MERGES]
    first_special = vocab_size - len(SPECIAL)
    pieces += [f"<|filler_{i}|>" for i in range(len(pieces), first_special)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    added = [{"id": first_special + i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
             for i, t in enumerate(SPECIAL)]
    bos = SPECIAL[0]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}, byte_level]},
        "post_processor": {"type": "TemplateProcessing",
                           "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                           "special_tokens": {bos: {"id": bos, "ids": [first_special], "tokens": [bos]}}},
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab,
                  "merges": [f"{a} {b}" for a, b in MERGES]}}, indent=None)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "add_bos_token": True,
        "clean_up_tokenization_spaces": False, "chat_template": CHAT})
    ids = {t: first_special + i for i, t in enumerate(SPECIAL)}
    return ids["<|begin_of_text|>"], [ids["<|end_of_text|>"], ids["<|im_end|>"]]


def write_config(folder, g, dtype, bos, eos):
    config = {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[g["family"]]], "model_type": g["family"],
        "hidden_size": g["hidden"], "num_hidden_layers": g["layers"], "num_attention_heads": g["heads"],
        "num_key_value_heads": g["kv_heads"], "head_dim": g["head_dim"], "intermediate_size": g["ffn"], "vocab_size": g["vocab"],
        "max_position_embeddings": g["positions"], "rms_norm_eps": g["eps"], "rope_theta": g["theta"], "rope_scaling": g["scaling"],
        "tie_word_embeddings": g["tied"], "hidden_act": "silu", "torch_dtype": DTYPES[dtype][1], "bos_token_id": bos, "eos_token_id": eos,
        "use_cache": True, "initializer_range": 0.02, "attention_dropout": 0.0,
    }
    if g["family"] == "llama":
        config.update(attention_bias=False, mlp_bias=False)
    else:
        config.update(use_sliding_window=False)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "do_sample": False})


def write_json(path, value, indent=2):
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", required=True, choices=sorted(GEOMETRIES))
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--factorise", type=float, metavar="SHARE", help="linear layers as WeLore's products of this share of their elements")
    args = parser.parse_args()
    g = GEOMETRIES[args.geometry]
    if args.out.exists() and any(args.out.iterdir()):
        raise SystemExit(f"{args.out} is not empty; name a new folder")
    args.out.mkdir(parents=True, exist_ok=True)
    bos, eos = write_tokenizer(args.out, g["vocab"])
    write_config(args.out, g, args.dtype, bos, eos)
    total = write_weights(args.out, g, args.dtype, args.seed, args.factorise)
    kv = 2 * g["layers"] * g["kv_heads"] * g["head_dim"] * 2
    print(f"{args.out}: {total / 2**30:.2f} GiB of {args.dtype} weights; a 16-bit KV cache takes {kv / 1024:.0f} KiB a token")


if __name__ == "__main__":
    main()
