"""PyTorch's attention of decoded positions in bf16, on this card: the best of its backends for each shape, as JSON for
`cargo bench --bench gpu` (SDPA=FILE). Heads that share a KV head are also tried as queries of one head, which every backend
takes and which is the same sum: no mask is needed, as a decoded position sees everything."""

import json
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, KV_HEADS, D = 32, 8, 128


def time(work, sets):
    """Microseconds of one call; data takes turns."""
    for s in range(min(sets, 3)):
        work(s)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for s in range(sets):
            work(s)
    graph.replay()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / sets)
    return sorted(times)[2]


def main():
    rows = []
    for context in [8192, 32768, 131072]:
        for batch in [1, 16, 64]:
            size = 2 * batch * context * KV_HEADS * D * 2
            if size > 40 << 30:
                continue
            sets = max(1, min(64, -(-(300 << 20) // size)))
            k = torch.randn(sets, batch, KV_HEADS, context, D, device="cuda", dtype=torch.bfloat16)
            v = torch.randn_like(k)
            q = torch.randn(batch, HEADS, 1, D, device="cuda", dtype=torch.bfloat16)
            folded = q.view(batch, KV_HEADS, HEADS // KV_HEADS, D)
            best = (float("inf"), "")
            for backend in [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]:
                for name, call in [
                    ("gqa", lambda s: F.scaled_dot_product_attention(q, k[s], v[s], enable_gqa=True)),
                    ("folded", lambda s: F.scaled_dot_product_attention(folded, k[s], v[s])),
                ]:
                    try:
                        with sdpa_kernel(backend):
                            us = time(call, sets)
                    except Exception as e:
                        print(f"{context} x {batch} {backend.name} {name}: {str(e).splitlines()[0][:90]}", file=sys.stderr)
                        continue
                    print(f"{context:>7} x {batch:<3} {backend.name:<20} {name:<7} {us:>10.1f} us {size / us / 1e3:>7.0f} GB/s", file=sys.stderr)
                    best = min(best, (us, f"{backend.name} {name}"))
            rows.append([context, batch, best[0], best[1]])
            del k, v
            torch.cuda.empty_cache()
    json.dump(rows, sys.stdout)


main()
