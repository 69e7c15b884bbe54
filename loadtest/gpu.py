"""PyTorch's attention of decoded positions in bf16, on this card: the best of its backends for each shape, as JSON for
`cargo bench --bench gpu` (SDPA=FILE). Heads that share a KV head are also tried as queries of one head, which every backend
takes and which is the same sum: no mask is needed, as a decoded position sees everything.

With `--dry` a card that is not there answers in made-up times for the shapes of `cargo test --bench gpu -- --dry`: all but CUDA
and PyTorch, neither of which is needed then. Exit status: 0, 1 where that does not come to what it must, 2 on wrong usage."""

import json
import sys

HEADS, KV_HEADS, D = 32, 8, 128


class Card:
    """This machine's, by PyTorch."""

    def __init__(self):
        import torch
        import torch.nn.functional as F
        from torch.nn.attention import SDPBackend, sdpa_kernel

        self.torch, self.attention, self.kernel = torch, F.scaled_dot_product_attention, sdpa_kernel
        self.backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]

    def forms(self, sets, batch, context):
        """By name, what attends over the data of a set."""
        k = self.torch.randn(sets, batch, KV_HEADS, context, D, device="cuda", dtype=self.torch.bfloat16)
        v = self.torch.randn_like(k)
        q = self.torch.randn(batch, HEADS, 1, D, device="cuda", dtype=self.torch.bfloat16)
        folded = q.view(batch, KV_HEADS, HEADS // KV_HEADS, D)
        return [
            ("gqa", lambda s: self.attention(q, k[s], v[s], enable_gqa=True)),
            ("folded", lambda s: self.attention(folded, k[s], v[s])),
        ]

    def time(self, backend, work, sets):
        """Microseconds of one call; data takes turns."""
        cuda = self.torch.cuda
        with self.kernel(backend):
            for s in range(min(sets, 3)):
                work(s)
            cuda.synchronize()
            graph = cuda.CUDAGraph()
            with cuda.graph(graph):
                for s in range(sets):
                    work(s)
            graph.replay()
            times = []
            for _ in range(5):
                start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
                start.record()
                graph.replay()
                end.record()
                cuda.synchronize()
                times.append(start.elapsed_time(end) * 1e3 / sets)
        return sorted(times)[2]

    def free(self):
        self.torch.cuda.empty_cache()


class Backend:
    def __init__(self, name):
        self.name = name


class Dry:
    """No card: the second backend is the best, the first refuses the first form, and the third the second without a word."""

    def __init__(self):
        self.backends = [Backend("FLASH_ATTENTION"), Backend("CUDNN_ATTENTION"), Backend("EFFICIENT_ATTENTION")]

    def forms(self, sets, batch, context):
        return [(name, lambda s, extra=extra: context * batch + extra) for name, extra in (("gqa", 1.0), ("folded", 2.0))]

    def time(self, backend, work, sets):
        times = [work(s) for s in range(sets)]
        if backend is self.backends[0] and times[0] % 2 == 1:
            raise RuntimeError("this form is not taken\nwith a second line")
        if backend is self.backends[2] and times[0] % 2 == 0:
            raise RuntimeError
        return sum(times) / sets + (10.0 if backend is self.backends[2] else 0.0)

    def free(self):
        pass


def measure(card, contexts, batches):
    """Context, batch, microseconds and the name of the best."""
    rows = []
    for context in contexts:
        for batch in batches:
            size = 2 * batch * context * KV_HEADS * D * 2
            if size > 40 << 30:
                continue
            sets = max(1, min(64, -(-(300 << 20) // size)))
            forms = card.forms(sets, batch, context)
            best = (float("inf"), "")
            for backend in card.backends:
                for name, call in forms:
                    try:
                        us = card.time(backend, call, sets)
                    except Exception as e:
                        print(f"{context} x {batch} {backend.name} {name}: {(str(e).splitlines() or [type(e).__name__])[0][:90]}", file=sys.stderr)
                        continue
                    print(f"{context:>7} x {batch:<3} {backend.name:<20} {name:<7} {us:>10.1f} us {size / us / 1e3:>7.0f} GB/s", file=sys.stderr)
                    best = min(best, (us, f"{backend.name} {name}"))
            rows.append([context, batch, best[0], best[1]])
            # What the forms hold of the card's memory goes before more is asked for.
            del forms, call
            card.free()
    return rows


def main():
    if sys.argv[1:] not in ([], ["--dry"]):
        print("gpu.py knows one word, --dry", file=sys.stderr)
        sys.exit(2)
    if not sys.argv[1:]:
        return json.dump(measure(Card(), [8192, 32768, 131072], [1, 16, 64]), sys.stdout)
    rows = measure(Dry(), [128, 640], [1, 2, 1 << 20])
    json.dump(rows, sys.stdout)
    if rows != [[c, b, c * b + 1.0, "CUDNN_ATTENTION gqa"] for c in (128, 640) for b in (1, 2)]:
        sys.exit("gpu.py --dry: the best of made-up times is not what it must be")


main()
