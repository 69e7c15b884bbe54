#!/usr/bin/env python3
"""What adapters cost: throughput of mixed batches, and what loading one does to streams that are running.

    python3 loadtest/adapters.py make --model /tmp/llama-1b --out /tmp/adapters --n 12 --rank 16
    strait serve /tmp/llama-1b --lora-root /tmp/adapters --port 8000 &
    python3 loadtest/adapters.py measure --url http://127.0.0.1:8000 --root /tmp/adapters

`make` needs numpy: it writes PEFT folders of random LoRAs on all linear layers, in bf16, of the model's own shapes. `measure` needs
the standard library. Cells of a round run one after another on the same server, so that a machine that slows down slows all;
the median over rounds is shown, and the share of the base's rate in the same round.

    base            every stream asks the model alone
    same            every stream asks one adapter
    distinct        every stream asks another adapter
    half            half of the streams ask the model alone, half an adapter each

Then streams of the model alone run while an adapter is asked for that is in memory (warm), one that is on disk (cold), and one is
loaded and unloaded through the API. The longest gap between two tokens of a running stream is told, beside the median gap:
a new request's prompt shares one step with them, so one gap of two or three steps is what any new request costs.
Exit status: 0, 1 when a request failed.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

import load


def make(args):
    import numpy as np

    from make_checkpoint import encode

    config = json.loads((Path(args.model) / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    q, kv, ffn = heads * head, config["num_key_value_heads"] * head, config["intermediate_size"]
    shapes = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q),
              "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    for n in range(args.n):
        rng = np.random.Generator(np.random.PCG64(args.seed + n))
        header, blobs, at = {}, [], 0
        for layer in range(config["num_hidden_layers"]):
            for name, (out, inputs) in shapes.items():
                for part, shape in (("A", (args.rank, inputs)), ("B", (out, args.rank))):
                    values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02 / (shape[1] ** 0.5) if part == "A" else 0.02)
                    blob = encode(values.reshape(-1), "bf16")
                    key = f"base_model.model.model.layers.{layer}.{name}.lora_{part}.weight"
                    header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + len(blob)]}
                    blobs.append(blob)
                    at += len(blob)
        folder = Path(args.out) / f"lora-{n:02}"
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / "adapter_model.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.writelines(blobs)
        (folder / "adapter_config.json").write_text(json.dumps({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": Path(args.model).name, "r": args.rank,
            "lora_alpha": 2 * args.rank, "target_modules": [s.split(".")[1] for s in shapes], "init_lora_weights": True}, indent=1) + "\n")
    print(f"{args.n} adapters of rank {args.rank}, {at / 2**20:.1f} MiB each, in {args.out}")


def at(args, model):
    return load.Server(args.url, model=model, api_key=args.api_key, extra=json.loads(args.extra))


async def call(args, path, body):
    begun = time.perf_counter()
    _, status, chunks = await at(args, None).open("POST", path, body)
    text = b"".join([c async for c in chunks]).decode()
    if status != 200:
        raise load.Refused(status, text)
    return time.perf_counter() - begun


async def cell(args, models, seed):
    """One stream for each model named; the rate of all together."""
    prompts = [load.text_of(8, seed + i) for i in range(len(models))]
    begun = [load.run_stream(at(args, m), p, args.max_tokens) for m, p in zip(models, prompts)]
    streams = await asyncio.gather(*begun)
    # From the moment the last one has started to the end of the first: everybody runs.
    first, last = max(s.first for s in streams), min(s.last for s in streams)
    tokens = 0
    for s in streams:
        t = s.first
        for gap in s.gaps:
            t += gap
            tokens += first < t <= last
    return tokens / (last - first)


async def beside(args, base, seed, event):
    """Streams of the base alone, and something that happens in their midst. (median gap, longest gap, seconds the event took)"""
    running = [asyncio.create_task(load.run_stream(at(args, base), load.text_of(8, seed + i), args.max_tokens)) for i in range(args.streams - 1)]
    await asyncio.sleep(args.wait)
    begun = time.perf_counter()
    took = await event()
    took = time.perf_counter() - begun if took is None else took
    streams = await asyncio.gather(*running)
    gaps = []
    for s in streams:
        t = s.first
        for gap in s.gaps:
            t += gap
            if begun - 0.05 <= t <= begun + took + 1.0:
                gaps.append(gap)
    if not gaps:
        sys.exit("the streams had ended before anything happened beside them: raise --max-tokens, or lower --wait")
    return statistics.median(g for s in streams for g in s.gaps), max(gaps), took


async def measure(args):
    base = (await at(args, None).json("GET", "/v1/models"))["data"][0]["id"]
    names = sorted(p.name for p in Path(args.root).iterdir() if (p / "adapter_config.json").exists())
    if len(names) < args.streams + 2:
        sys.exit(f"{args.root} has {len(names)} adapters; {args.streams + 2} are needed")
    used, cold = names[:args.streams], names[args.streams:]
    loads = [await call(args, "/v1/load_lora_adapter", {"lora_name": n, "lora_path": n, "load_inplace": True}) for n in used]
    n = args.streams
    cells = {"base": [base] * n, "same": used[:1] * n, "distinct": used, "half": [base] * (n // 2) + used[n // 2:]}
    rates = {name: [] for name in cells}
    shares = {name: [] for name in cells}
    await cell(args, cells["distinct"], 1)
    for repeat in range(args.rounds):
        order = list(cells) if repeat % 2 == 0 else list(cells)[::-1]
        got = {name: await cell(args, cells[name], 1000 * repeat + 17 * i) for i, name in enumerate(order)}
        for name, rate in got.items():
            rates[name].append(rate)
            shares[name].append(rate / got["base"])
    out = {"streams": n, "max_tokens": args.max_tokens, "load_seconds": statistics.median(loads), "cells": {}, "beside": {}}
    print(f"{n} streams, {args.max_tokens} tokens, {args.rounds} rounds; loading one took {statistics.median(loads) * 1e3:.0f} ms (median)")
    print(f"{'cell':<12}{'tokens/s':>10}{'of base':>10}{'from':>8}{'to':>8}")
    for name in cells:
        share = statistics.median(shares[name])
        out["cells"][name] = {"rate": statistics.median(rates[name]), "share": share, "shares": shares[name]}
        print(f"{name:<12}{statistics.median(rates[name]):>10.1f}{share:>10.3f}{min(shares[name]):>8.3f}{max(shares[name]):>8.3f}")

    async def ask(model):
        await load.run_stream(at(args, model), load.text_of(8, 99), 8)

    async def swap(name):
        seconds = await call(args, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": name})
        await call(args, "/v1/unload_lora_adapter", {"lora_name": name})
        return seconds

    events = {"nothing": lambda i: asyncio.sleep(0.2, 0.2), "base": lambda i: ask(base), "warm": lambda i: ask(used[i % n]),
              "load+unload": lambda i: swap(cold[i % len(cold)])}
    print(f"\n{'beside':<12}{'median gap':>12}{'longest':>10}{'steps':>8}{'took':>10}")
    for name, event in events.items():
        found = [await beside(args, base, 5000 + 100 * i, lambda i=i: event(i)) for i in range(args.rounds)]
        median, longest, took = (statistics.median(f[i] for f in found) for i in range(3))
        out["beside"][name] = {"median_gap": median, "longest_gap": longest, "took": took}
        print(f"{name:<12}{median * 1e3:>10.1f}ms{longest * 1e3:>8.1f}ms{longest / median:>8.2f}{took * 1e3:>8.0f}ms")
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    m = commands.add_parser("make")
    m.add_argument("--model", required=True)
    m.add_argument("--out", required=True)
    m.add_argument("--n", type=int, default=12)
    m.add_argument("--rank", type=int, default=16)
    m.add_argument("--seed", type=int, default=0)
    m = commands.add_parser("measure")
    m.add_argument("--url", default="http://127.0.0.1:8000")
    m.add_argument("--root", required=True, help="the folder the server was given as --lora-root")
    m.add_argument("--api-key")
    m.add_argument("--extra", default="{}", help="JSON that every request carries, such as a cache_profile")
    m.add_argument("--streams", type=int, default=8)
    m.add_argument("--max-tokens", type=int, default=64)
    m.add_argument("--rounds", type=int, default=5)
    m.add_argument("--wait", type=float, default=3.0, help="seconds that streams run before something happens beside them")
    m.add_argument("--json")
    args = parser.parse_args()
    if args.command == "make":
        return make(args)
    try:
        asyncio.run(measure(args))
    except (load.Refused, ConnectionError, OSError) as error:
        sys.exit(f"adapters.py: {error}")


if __name__ == "__main__":
    main()
