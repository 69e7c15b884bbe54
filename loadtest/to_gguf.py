#!/usr/bin/env python3
"""Converts a folder made by make_checkpoint.py to one GGUF file, so that llama.cpp runs the very same weights.

    pip install gguf numpy
    python3 loadtest/to_gguf.py /tmp/llama-1b /tmp/llama-1b.gguf

Matrices keep their dtype (BF16 stays BF16); norms and biases become float32, as llama.cpp wants them. llama.cpp rotates
neighbouring channels in its `llama` architecture where Hugging Face rotates the two halves of a head, so the rows of q
and k are reordered there; `qwen2` rotates halves in both. A Llama 3 rope scaling becomes the tensor rope_freqs.weight.
"""

import argparse
import json
import math
from pathlib import Path

import gguf
import numpy as np

NUMPY = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}  # numpy has no bfloat16: its bits as uint16
GGML = {"BF16": gguf.GGMLQuantizationType.BF16, "F16": gguf.GGMLQuantizationType.F16, "F32": gguf.GGMLQuantizationType.F32}
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def read_weights(folder):
    """(name, dtype, memory-mapped array) of every tensor of every shard."""
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                dtype, shape = entry["dtype"], tuple(entry["shape"])
                yield name, dtype, np.memmap(path, NUMPY[dtype], "r", 8 + size + entry["data_offsets"][0], shape)


def gguf_name(name):
    if name in TOP:
        return TOP[name]
    parts = name.split(".")  # model.layers.N.<module...>.weight
    return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:-1])]}.{parts[-1]}"


def interleaved(rows, heads):
    """Rows of each head from halves (0, d/2, 1, d/2+1, ...) order to neighbouring pairs."""
    shape = rows.shape
    return np.ascontiguousarray(rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2)).reshape(shape)


def float32(array, dtype):
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else np.asarray(array, np.float32)


def rope_factors(config, head_dim):
    """What llama.cpp divides each inverse frequency by, for Llama 3's scaling."""
    s = config["rope_scaling"]
    inverse = [config["rope_theta"] ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    out = []
    for f in inverse:
        turns = s["original_max_position_embeddings"] * f / (2 * math.pi)  # over the original context
        if turns < s["low_freq_factor"]:
            out.append(s["factor"])
        elif turns > s["high_freq_factor"]:
            out.append(1.0)
        else:
            smooth = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
            out.append(1 / ((1 - smooth) / s["factor"] + smooth))
    return np.array(out, np.float32)


def add_tokenizer(writer, folder, vocab_size):
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [gguf.TokenType.UNUSED] * vocab_size
    for piece, i in tokenizer["model"]["vocab"].items():
        tokens[i], kinds[i] = piece, gguf.TokenType.NORMAL
    for token in tokenizer["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    writer.add_bos_token_id(tokens.index(settings["bos_token"]))
    writer.add_eos_token_id(tokens.index(settings["eos_token"]))
    writer.add_add_bos_token(bool(settings.get("add_bos_token")))
    if "chat_template" in settings:
        writer.add_chat_template(settings["chat_template"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    config = json.loads((args.folder / "config.json").read_text())
    family = config["model_type"]
    if family not in ("llama", "qwen2"):
        raise SystemExit(f"{family}: only llama and qwen2 are converted here; llama.cpp's own convert_hf_to_gguf.py knows the rest")
    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]

    writer = gguf.GGUFWriter(args.out, family)
    writer.add_name(args.folder.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    dtypes = {dtype for _, dtype, _ in read_weights(args.folder)}
    writer.add_file_type({"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16,
                          "BF16": gguf.LlamaFileType.MOSTLY_BF16}[dtypes.pop()])
    add_tokenizer(writer, args.folder, config["vocab_size"])

    scaling = config.get("rope_scaling")
    if scaling is not None:
        if scaling.get("rope_type") != "llama3":
            raise SystemExit(f"rope scaling {scaling} is not converted here")
        writer.add_tensor("rope_freqs.weight", rope_factors(config, head_dim))
    for name, dtype, array in read_weights(args.folder):
        if family == "llama" and (".q_proj." in name or ".k_proj." in name):
            array = interleaved(array, heads if ".q_proj." in name else kv_heads)
        if array.ndim == 1:
            writer.add_tensor(gguf_name(name), float32(array, dtype))
        elif dtype == "BF16":
            writer.add_tensor(gguf_name(name), np.asarray(array).view(np.uint8), raw_dtype=GGML[dtype])
        else:
            writer.add_tensor(gguf_name(name), np.asarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=False)
    writer.close()
    print(f"{args.out}: {args.out.stat().st_size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
