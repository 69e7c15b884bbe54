#!/usr/bin/env python3
"""Makes tests/golden/models: tiny random checkpoints of every family, and what Hugging Face transformers says of them.

Rerun, from anywhere (the results are committed; the test suite never runs this):

    python3 -m venv /tmp/golden && /tmp/golden/bin/pip install torch transformers safetensors numpy
    /tmp/golden/bin/python tests/golden/make_models.py            # all families
    /tmp/golden/bin/python tests/golden/make_models.py qwen3      # one of them

Weights come from numpy's PCG64, seeded by family and tensor name, and are rounded to the stored dtype before the
reference sees them; so stored and computed weights are the same numbers. The reference runs in float32 on one CPU
thread with eager attention. Greedy continuations are computed twice, with the KV cache and by recomputing the whole
sequence, and must agree; a prompt whose continuation holds a near-tie or is monotonous is redrawn.

Each folder holds config.json (transformers v4 spelling in some, v5 in others, see V4), the weights (one file or shards
with an index), generation_config.json and expected.json:

    {"made_with": {...}, "cases": [{
        "prompt": [ids],                     lengths 1, 5, 63, 64, 65, 200, 300
        "logprobs": [n-1 floats],            ln p(prompt[i+1] | prompt[..=i]), natural logarithm
        "top": [{"id", "logprob"} x 5],      after the last prompt token, best first
        "continuation": [24 ids],            greedy, end-of-sequence ignored
        "continuation_logprobs": [24],
        "min_gap": float}]}                  least top1 - top2 logprob along the continuation
"""

import json
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent / "models"
PROMPT_LENGTHS = [1, 5, 63, 64, 65, 200, 300]
CONTINUATION = 24
MIN_GAP = 5e-3  # in logprob; far above the float32 noise of another summation order
MIN_DISTINCT = 10  # distinct ids in a continuation
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Families that write config.json as transformers v4 did: rope_theta and rope_scaling at the top level, torch_dtype.
V4 = {"llama2", "llama-linear", "llama3", "qwen2", "mistral"}


def families():
    """name -> (config, stored dtype, number of shards, keys to leave out of config.json)."""
    llama = transformers.LlamaConfig
    rope = lambda **kw: {"rope_type": "default", **kw}
    return {
        # Llama 2: multi-head, untied, no head_dim in the config, half floats.
        "llama2": (llama(
            vocab_size=256, hidden_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=6,
            intermediate_size=160, max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False,
            rope_parameters=rope(rope_theta=10000.0), bos_token_id=1, eos_token_id=2), "float16", 1, ["head_dim"]),
        # Llama 3.2: four query heads to a KV head, tied, llama3 scaling that already bites at position 16, three shards.
        "llama3": (llama(
            vocab_size=320, hidden_size=128, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, head_dim=16,
            intermediate_size=192, max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=True,
            rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
            bos_token_id=300, eos_token_id=[301, 308, 309]), "bfloat16", 3, []),
        # attention_bias puts biases on q, k, v and o; mlp_bias on all three of the MLP.
        "llama-bias": (llama(
            vocab_size=256, hidden_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=80,
            intermediate_size=128, max_position_embeddings=2048, rms_norm_eps=1e-6, tie_word_embeddings=False,
            attention_bias=True, mlp_bias=True, rope_parameters=rope(rope_theta=10000.0), bos_token_id=1,
            eos_token_id=2), "bfloat16", 1, []),
        # The oldest spelling of linear scaling, and an epsilon large enough to show.
        "llama-linear": (llama(
            vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
            intermediate_size=128, max_position_embeddings=1024, rms_norm_eps=1e-3, tie_word_embeddings=False,
            rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, bos_token_id=1,
            eos_token_id=2), "float32", 1, []),
        "llama-yarn": (llama(
            vocab_size=256, hidden_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=96,
            intermediate_size=128, max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=False,
            rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
                             "original_max_position_embeddings": 128}, bos_token_id=1, eos_token_id=2),
            "bfloat16", 1, []),
        # Mistral Nemo's quirk: heads * head_dim is not the hidden size.
        "mistral": (transformers.MistralConfig(
            vocab_size=288, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
            intermediate_size=160, max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False,
            sliding_window=None, rope_parameters=rope(rope_theta=1000000.0), bos_token_id=1, eos_token_id=2),
            "bfloat16", 2, []),
        # Qwen2.5: biases on q, k, v only; tied; an odd group of seven; sliding-window keys present and switched off.
        "qwen2": (transformers.Qwen2Config(
            vocab_size=320, hidden_size=112, num_hidden_layers=3, num_attention_heads=7, num_key_value_heads=1,
            intermediate_size=192, max_position_embeddings=4096, rms_norm_eps=1e-6, tie_word_embeddings=True,
            use_sliding_window=False, sliding_window=4096, max_window_layers=3, rope_parameters=rope(rope_theta=1000000.0),
            bos_token_id=310, eos_token_id=311), "bfloat16", 1, ["head_dim", "layer_types"]),
        # Qwen3: RMSNorm on each head of q and k, head_dim 128 beside a small hidden size, eight query heads to a KV head.
        "qwen3": (transformers.Qwen3Config(
            vocab_size=384, hidden_size=48, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=2, head_dim=128,
            intermediate_size=160, max_position_embeddings=4096, rms_norm_eps=1e-6, tie_word_embeddings=False,
            rope_parameters=rope(rope_theta=1000000.0), bos_token_id=310, eos_token_id=311), "bfloat16", 1, []),
    }


def rng_for(*labels):
    return np.random.Generator(np.random.PCG64(zlib.crc32("/".join(map(str, labels)).encode())))


def draw(family, name, shape, hidden):
    """One tensor. Scales keep activations near 1, attention scores near a standard deviation of 2.5, and every norm,
    bias and rotation visible in the logits."""
    rng = rng_for("weights", family, name)
    if name == "model.norm.weight":
        # Both signs, or a model with a tied head would only repeat its last token.
        return rng.uniform(0.5, 1.5, shape) * rng.choice([-1.0, 1.0], shape)
    if name.endswith("norm.weight"):
        return rng.uniform(0.5, 1.5, shape)
    if name.endswith(".bias"):
        return rng.normal(0.0, 0.25, shape)
    if "embed_tokens" in name or "lm_head" in name:
        return rng.normal(0.0, 2.4 / np.sqrt(hidden), shape)
    if ".q_proj." in name or ".k_proj." in name:
        return rng.normal(0.0, 1.6 / np.sqrt(shape[1]), shape)
    return rng.normal(0.0, 1.0 / np.sqrt(shape[1]), shape)


def build(family, config, dtype):
    """The model in float32 holding weights already rounded to `dtype`, and those weights as stored."""
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    stored = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied head is listed once, as the embedding
            values = draw(family, name, tuple(parameter.shape), config.hidden_size)
            stored[name] = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(dtype)
            parameter.copy_(stored[name].to(torch.float32))
    assert model.config._attn_implementation == "eager"
    assert ("lm_head.weight" in stored) != config.tie_word_embeddings
    return model, stored


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def greedy_recomputed(model, prompt):
    ids, steps = list(prompt), []
    for _ in range(CONTINUATION):
        logp = torch.log_softmax(logits_of(model, ids)[-1].double(), -1)
        best = torch.topk(logp, 2)
        steps.append((int(best.indices[0]), float(best.values[0]), float(best.values[0] - best.values[1])))
        ids.append(steps[-1][0])
    return steps


def greedy_cached(model, prompt):
    ids, tokens, past = torch.tensor([prompt]), [], None
    with torch.no_grad():
        for _ in range(CONTINUATION):
            out = model(ids, past_key_values=past, use_cache=True)
            past = out.past_key_values
            tokens.append(int(out.logits[0, -1].argmax()))
            ids = torch.tensor([[tokens[-1]]])
    return tokens


def case(family, model, length):
    for attempt in range(400):
        rng = rng_for("prompt", family, length, attempt)
        prompt = [int(t) for t in rng.integers(0, model.config.vocab_size, length)]
        tokens = greedy_cached(model, prompt)
        if len(set(tokens)) < MIN_DISTINCT:
            continue
        steps = greedy_recomputed(model, prompt)
        gap = min(s[2] for s in steps)
        if gap < MIN_GAP:
            continue
        assert [s[0] for s in steps] == tokens, (family, length, attempt)
        logp = torch.log_softmax(logits_of(model, prompt).double(), -1)
        top = torch.topk(logp[-1], 5)
        return {
            "prompt": prompt,
            "logprobs": [round(float(logp[i, prompt[i + 1]]), 8) for i in range(length - 1)],
            "top": [{"id": int(i), "logprob": round(float(v), 8)} for i, v in zip(top.indices, top.values)],
            "continuation": tokens,
            "continuation_logprobs": [round(s[1], 8) for s in steps],
            "min_gap": round(gap, 6),
        }
    raise SystemExit(f"{family}: no prompt of {length} tokens gives a clear and varied continuation")


def v4_spelling(config):
    """The same config as transformers 4 wrote it."""
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    if kind == "default":
        config["rope_scaling"] = None
    elif kind == "linear":
        config["rope_scaling"] = {"type": "linear", **rope}  # the oldest spelling: `type`, not `rope_type`
    else:
        config["rope_scaling"] = {"rope_type": kind, **rope}
    if config.get("use_sliding_window") is False:
        config["sliding_window"] = 4096  # Qwen2.5 folders name a window and switch it off
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.44.2"
    return config


def shards_of(stored, count):
    """Splits by size in name order; a layer may straddle two files, as in real checkpoints."""
    total = sum(t.nbytes for t in stored.values())
    shards, filled = [{} for _ in range(count)], 0
    for name, tensor in stored.items():
        shards[min(count - 1, filled * count // total)][name] = tensor
        filled += tensor.nbytes
    assert all(shards)
    return shards, total


def write(folder, family, config, dtype_name, stored, n_shards, leave_out, cases):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = config.to_dict()
    text["dtype"] = dtype_name
    text["architectures"] = [{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                              "qwen3": "Qwen3ForCausalLM"}[text["model_type"]]]
    text.pop("_name_or_path", None)
    if family in V4:
        text = v4_spelling(text)
    for key in leave_out:
        text.pop(key, None)
    (folder / "config.json").write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")
    generation = {"_from_model_config": True, "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id,
                  "do_sample": True, "temperature": 0.6, "top_p": 0.9, "transformers_version": text["transformers_version"]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    if n_shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        shards, total = shards_of(stored, n_shards)
        weight_map = {}
        for i, shard in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map.update({name: file for name in shard})
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    made_with = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    body = {"made_with": made_with, "cases": cases}
    lines = ",\n".join("  " + json.dumps(c) for c in cases)
    text = '{"made_with": %s, "cases": [\n%s\n]}\n' % (json.dumps(made_with), lines)
    assert json.loads(text) == body
    (folder / "expected.json").write_text(text)


def reload_and_check(folder, cases):
    """What is on disk, read back by transformers' own loader, gives the numbers just written."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for c in cases:
        logp = torch.log_softmax(logits_of(model, c["prompt"]).double(), -1)
        got = [float(logp[i, c["prompt"][i + 1]]) for i in range(len(c["prompt"]) - 1)]
        worst = max((abs(a - b) for a, b in zip(got, c["logprobs"])), default=0.0)
        worst = max(worst, max(abs(float(logp[-1, t["id"]]) - t["logprob"]) for t in c["top"]))
        assert worst < 1e-5, (folder.name, len(c["prompt"]), worst)


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    everything = families()
    for family in sys.argv[1:] or everything:
        config, dtype_name, n_shards, leave_out = everything[family]
        model, stored = build(family, config, DTYPES[dtype_name])
        cases = [case(family, model, n) for n in PROMPT_LENGTHS]
        folder = HERE / family
        write(folder, family, config, dtype_name, stored, n_shards, leave_out, cases)
        reload_and_check(folder, cases)
        size = sum(f.stat().st_size for f in folder.iterdir())
        entropy = np.mean([-c["top"][0]["logprob"] for c in cases])
        mean = np.mean([x for c in cases for x in c["logprobs"]])
        print(f"{family:14} {size / 1024:7.0f} KiB  -ln p(top1) {entropy:5.2f}  mean prompt logprob {mean:6.2f}  "
              f"least gap {min(c['min_gap'] for c in cases):.4f}")


if __name__ == "__main__":
    main()
