#!/usr/bin/env python3
"""Whether answers under load are those of an idle server, and whether every book is balanced afterwards. Standard library only.

    cargo build --release && python3 loadtest/soak.py --strait target/release/strait --seconds 60 --rounds 2
    python3 loadtest/soak.py --strait target/release/strait --short --cache 3MiB            # little memory, long answers: preemption
    LD_LIBRARY_PATH=... python3 loadtest/soak.py --strait ... --device cuda --tiny          # slow where the device is emulated

A seed draws requests to the demo model: every cache profile, its three adapters, greedy and seeded, several choices, penalties, stop
strings, prompts of up to 2,800 tokens. Each is answered first by an idle server without prefix cache. Then many clients ask for them at
once, in one piece and as streams, with priorities, some under a salt of their own, some leaving in the middle, while adapters
are loaded, unloaded, rolled back, and change under one name, and three scrapers read the metrics. What must hold:

    answers    text, token ids and log-probabilities are equal to the bit, where the README promises that (on a device: how many agree is told)
    statuses   nothing but 200, 429, 404 of an adapter that is gone, and 503 while the server drains
    metrics    bytes by branch are the arena; one series of adapters; ends of sequences are as many as
               were taken, tokens as many as were told, and preemptions as many as were suffered
    memory     afterwards nothing is held, usage is zero, and a prompt as large as the arena finds all of it
    the end    SIGTERM under load: whoever was being answered is, nobody waits for ever, and the exit status is 0

Exit status: 0, 1 when something did not hold, 2 on wrong usage.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import load

ADAPTERS = Path(__file__).resolve().parent.parent / "tests" / "golden" / "demo-adapters"
NAMES = ["pirate", "shout", "terse"]
SHORT = ["What is the capital of France?", "Tell me a short story.", "Hello!", "Who are you?", "What is the capital of Italy?"]
WORDS = [f"{a}-{n}" for a in "red blue old quiet happy dark fresh tall amber jolly steady empty thin royal flat narrow fierce weak strange fancy".split()
         for n in "lion house river lamp garden window bridge candle rabbit temple bucket stone".split()]
CHAT = "/v1/chat/completions"


def record(lines, base, which):
    text = "\n".join(f"line {WORDS[i]}: REGISTER_CONTENT is <{base + 683 * i}>" for i in range(lines))
    return f"{text}\nNow the record is over. Tell me what is the REGISTER_CONTENT in line {WORDS[which % lines]}? I need the number."


def catalogue(args, rng):
    """Bodies of requests."""
    bodies = []
    for _ in range(args.items):
        kind, base = rng.random(), rng.choice([10007, 20011])
        if args.tiny:
            text, most = rng.choice(SHORT) if kind < 0.5 else record(rng.choice([3, 6, 9, 12]), base, rng.randrange(12)), rng.choice([3, 8, 20])
        elif args.short:
            text, most = rng.choice(SHORT) if kind < 0.5 else record(rng.choice([3, 10, 20]), base, rng.randrange(20)), rng.choice([100, 300, 500])
        elif kind < 0.35:
            text, most = rng.choice(SHORT), rng.choice([4, 40, 150, 300])
        elif kind < 0.75:
            text, most = record(rng.choice([10, 20, 30, 45]), base, rng.randrange(240)), rng.choice([4, 30, 120, 260])
        else:
            text, most = record(rng.choice([90, 130, 180]), base, rng.randrange(240)), rng.choice([6, 60, 200])
        body = {"model": rng.choice(["strait-demo"] * 3 + NAMES), "messages": [{"role": "user", "content": text}], "max_tokens": most,
                "cache_profile": rng.choice(args.profiles.split(",")), "temperature": 0, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
        if args.short or rng.random() < 0.5:
            body["ignore_eos"] = True
        if rng.random() < 0.2:
            body["n"] = rng.choice([2, 3, 5, 8])
        if rng.random() < 0.2:
            body |= {"temperature": 0.9, "top_p": 0.9, "seed": rng.randrange(1 << 30)}
        if rng.random() < 0.1:
            body |= {"presence_penalty": 0.7, "repetition_penalty": 1.1}
        if rng.random() < 0.1:
            body |= {"stop": ["the"]}
        bodies.append(body)
    # Of some there is the same under another adapter, so that a name that points to either has two right answers.
    for body in [b for b in bodies if b["model"] in ("pirate", "shout") and rng.random() < 0.5]:
        bodies.append(body | {"model": "shout" if body["model"] == "pirate" else "pirate"})
    return bodies


# --- one server ------------------------------------------------------------------------------------------------------

class Strait(load.Server):
    """A server of our own."""

    def __init__(self, args, *flags):
        super().__init__(f"http://127.0.0.1:{args.port}")
        self.log = open(args.log, "w+")
        command = [args.strait, "serve", "--device", args.device, "--port", str(args.port), "--lora-root", ADAPTERS, *flags]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    async def ready(self):
        while self.process.poll() is None:
            try:
                await self.json("GET", "/ready")
                break
            except (OSError, load.Refused):
                await asyncio.sleep(0.1)
        else:
            sys.exit(f"the server ended: {Path(self.log.name).read_text()[-2000:]}")
        for name in NAMES:
            await self.adapter("load", lora_name=name, lora_path=str(ADAPTERS / name))

    async def whole(self, method, path, body=None, leave=None):
        """Status and text; None where we left after so many chunks."""
        _, status, chunks = await self.open(method, path, body)
        got = []
        async for chunk in chunks:
            got.append(chunk)
            if leave is not None and len(got) >= leave:
                await chunks.aclose()
                return None
        return status, b"".join(got).decode()

    async def adapter(self, what, **body):
        return await asyncio.wait_for(self.whole("POST", f"/v1/{what}_lora_adapter", body), 60)

    async def metrics(self):
        status, text = await asyncio.wait_for(self.whole("GET", "/metrics"), 60)
        assert status == 200, text
        lines = [line.rpartition(" ") for line in text.split("\n") if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}


def series(metrics, name):
    return {k: v for k, v in metrics.items() if k == name or k.startswith(name + "{")}


def value(metrics, name):
    return sum(series(metrics, name).values())


def told(text, stream):
    """What each choice said, or the error, and the usage."""
    def scores(part):
        return [(t["token"], t["logprob"], [(x["token"], x["logprob"]) for x in t["top_logprobs"]]) for t in part]

    if not stream:
        reply = json.loads(text)
        if "error" in reply:
            return None, reply["error"], None
        said = {c["index"]: [c["message"]["content"], c["token_ids"], scores(c["logprobs"]["content"]), c["finish_reason"]] for c in reply["choices"]}
        return said, None, reply["usage"]
    choices, usage, done = {}, None, False
    for line in text.split("\n"):
        if line == "data: [DONE]":
            done = True
        elif line.startswith("data: "):
            frame = json.loads(line[6:])
            if "error" in frame:
                return None, frame["error"], None
            usage = frame.get("usage") or usage
            for c in frame["choices"]:
                choice = choices.setdefault(c["index"], ["", [], [], None])
                choice[0] += c["delta"].get("content") or ""
                choice[1] += c.get("token_ids") or []
                choice[2] += scores((c.get("logprobs") or {}).get("content") or [])
                choice[3] = c.get("finish_reason") or choice[3]
    return (choices, None, usage) if done else (None, {"code": "no [DONE]"}, None)


# --- the load --------------------------------------------------------------------------------------------------------

class Soak:
    def __init__(self, args):
        self.args, self.rng = args, random.Random(args.seed)
        self.bodies, self.alone = catalogue(args, self.rng), []
        self.wrong, self.counts = [], {}
        self.stop = self.draining = False

    def problem(self, what):
        self.wrong.append(what)
        if len(self.wrong) <= 40:
            print(f"wrong: {what[:400]}", flush=True)

    def count(self, what, n=1):
        self.counts[what] = self.counts.get(what, 0) + n

    async def reference(self):
        server = Strait(self.args, "--kv-cache-memory-bytes", "128MiB", "--no-enable-prefix-caching")
        await server.ready()
        begun = time.time()
        for body in self.bodies:
            status, text = await server.whole("POST", CHAT, body)
            assert status == 200, text
            self.alone.append(told(text, False)[0])
        server.process.terminate()
        if server.process.wait(60) != 0:
            self.problem("the idle server ended badly")
        tokens = sum(len(choice[1]) for choices in self.alone for choice in choices.values())
        print(f"{len(self.alone)} requests answered alone in {time.time() - begun:.1f} s, {tokens} tokens", flush=True)

    async def client(self, server, rng):
        while not self.stop:
            at = rng.randrange(len(self.bodies))
            body, want = dict(self.bodies[at]), [self.alone[at]]
            salted, stream = rng.random() < 0.5, rng.random() < 0.5
            if salted:
                body["cache_salt"] = f"s{rng.randrange(1 << 60)}"
            if rng.random() < 0.3:
                body["priority"] = rng.choice([-5, 0, 3, 9])
            if body["model"] in NAMES and rng.random() < 0.1:
                either = [i for i, b in enumerate(self.bodies) if b | {"model": 0} == self.bodies[at] | {"model": 0} and b["model"] in ("pirate", "shout")]
                if len(either) == 2:
                    body["model"], want = "switch", [self.alone[i] for i in either]
            if stream:
                body |= {"stream": True, "stream_options": {"include_usage": True}}
            impatient = rng.random() < 0.15
            leave = rng.randrange(1, 30) if stream and rng.random() < 0.1 else None
            try:
                got = await asyncio.wait_for(server.whole("POST", CHAT, body, leave), rng.uniform(0.01, 3) if impatient else 300)
            except asyncio.TimeoutError:
                self.count("left") if impatient else self.problem(f"no answer in 300 s to request {at}")
                continue
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                if self.draining:
                    return
                self.problem(f"request {at}: {error!r}")
                continue
            if got is None:
                self.count("left")
            elif not self.judge(body, at, got, want, salted, stream):
                await asyncio.sleep(rng.uniform(0.05, 0.4))

    def judge(self, body, at, got, want, salted, stream):
        """Whether there was an answer; says what of it is wrong."""
        status, text = got
        self.count(f"status {status}")
        if status == 429 or (status == 404 and body["model"] in ("terse", "switch")) or (status == 503 and self.draining):
            return False
        said, error, usage = told(text, stream) if status == 200 else (None, text, None)
        if error:
            if not (self.draining and status == 200):
                self.problem(f"request {at}, status {status}: {error}")
            return False
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        self.count("tokens from the prefix cache", cached)
        # A compressed prompt whose beginning is found cached reads it compressed; of several choices only the first says whether it was.
        if body["cache_profile"] != "full" and not self.args.no_prefix and (body.get("n", 1) > 1 or (cached > 0 and not salted)):
            self.count("not to be compared")
        elif said in want:
            self.count(f"equal, {body['cache_profile']}")
        elif self.args.device == "cpu":
            self.problem(f"request {at}, {body['cache_profile']}, {body['model']}, stream {stream}, {cached} cached: {said} is not {want[0]}")
        else:
            self.count("tokens of a device, equal", sum(a == b for i in want[0] for a, b in zip(said[i][1], want[0][i][1])))
            self.count("tokens of a device", sum(len(choice[1]) for choice in want[0].values()))
        return True

    async def meddle(self, server, rng):
        while not self.stop:
            await asyncio.sleep(rng.uniform(0.05, 0.7))
            calls = [("load", {"lora_name": "switch", "lora_path": str(ADAPTERS / rng.choice(["pirate", "shout"])), "load_inplace": True}),
                     ("load", {"lora_name": "terse", "lora_path": str(ADAPTERS / "terse"), "load_inplace": True}),
                     ("unload", {"lora_name": rng.choice(["terse", "switch"])}), ("rollback", {"lora_name": "switch"})]
            what, body = rng.choice(calls)
            try:
                status, text = await server.adapter(what, **body)
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                return None if self.draining else self.problem(f"{what}: {error!r}")
            self.count(f"adapters {status}")
            if status >= 500 and not self.draining:
                self.problem(f"{what}: {status} {text}")

    async def watch(self, server, rng, seen):
        while not self.stop:
            try:
                metrics = await server.metrics()
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                return None if self.draining else self.problem(f"metrics: {error!r}")
            self.check(metrics)
            seen.append(value(metrics, "strait:process_resident_bytes") / 2**20)
            await asyncio.sleep(rng.uniform(0, 0.3))

    def check(self, metrics):
        """Every byte of the arena is of one branch."""
        arena, bytes_ = (value(metrics, f"strait:kv_cache_{name}") for name in ("arena_bytes", "bytes"))
        if arena != bytes_ or self.branch(metrics, "rounding") > arena / 2:
            self.problem(f"{bytes_} bytes by branch of {arena}: {series(metrics, 'strait:kv_cache_bytes')}")
        if len(series(metrics, "vllm:lora_requests_info")) != 1:
            self.problem(f"series of adapters: {series(metrics, 'vllm:lora_requests_info')}")

    @staticmethod
    def branch(metrics, name):
        return value(metrics, f'strait:kv_cache_bytes{{branch="{name}",profile=""}}')

    async def quiet(self, server):
        """Metrics once nothing runs."""
        for _ in range(600):
            metrics = await server.metrics()
            self.check(metrics)
            held = {k: v for k, v in series(metrics, "strait:kv_cache_bytes").items() if v and 'profile=""' not in k}
            if value(metrics, "vllm:num_requests_running") + value(metrics, "vllm:num_requests_waiting") == 0 and not held:
                if value(metrics, "vllm:kv_cache_usage_perc") != 0:
                    self.problem(f"nobody holds a page, and usage is {value(metrics, 'vllm:kv_cache_usage_perc')}")
                return metrics
            await asyncio.sleep(0.1)
        self.problem(f"nothing comes in, and this is held: {held}")
        return metrics

    async def settle(self, server, lost):
        metrics = await self.quiet(server)
        taken, ended = value(metrics, "vllm:request_params_max_tokens_count"), series(metrics, "vllm:request_success_total")
        for what, a, b in [
            ("sequences taken and ended", taken, sum(ended.values())),
            ("sequences taken, and times of their ends", taken, value(metrics, "vllm:e2e_request_latency_seconds_count")),
            ("sequences started and ended", value(metrics, "vllm:request_queue_time_seconds_count"), value(metrics, "vllm:request_prefill_time_seconds_count")),
            ("tokens told, and of sequences that ended", value(metrics, "vllm:generation_tokens_total"), value(metrics, "vllm:request_generation_tokens_sum")),
            ("preemptions", value(metrics, "vllm:num_preemptions_total"), value(metrics, "vllm:request_num_preemptions_sum")),
            ("panics", value(metrics, "strait:panics_total"), 0),
        ]:
            if a != b:
                self.problem(f"{what}: {a} and {b}")
        # A prompt of full pages that fills the arena finds all of it.
        if not self.args.tiny:
            capacity = await server.json("GET", "/v1/capacity")
            pages = int(value(metrics, "strait:kv_cache_arena_bytes") // (64 * capacity["profiles"][0]["bytes_per_token"]))
            prompt = [5 + i % 50 for i in range(min(pages * 64, 16384) - 2)]
            status, text = await server.whole("POST", "/v1/completions", {"model": "strait-demo", "prompt": prompt, "max_tokens": 1, "cache_salt": "all"})
            if status != 200:
                self.problem(f"a prompt as large as the arena: {status} {text}")
            # Gauges may be those of a moment before its answer.
            for _ in range(20):
                left = self.branch(await self.quiet(server), "rounding")
                if left == lost:
                    break
                await asyncio.sleep(0.1)
            else:
                self.problem(f"{left} bytes are lost where exact pages alone are cached, {lost} in an empty arena")
        reasons = ", ".join(f"{k.split('finished_reason=')[1].split(',')[0]} {v:.0f}" for k, v in ended.items()).replace('"', "")
        print(f"  {taken:.0f} sequences ({reasons}), {value(metrics, 'vllm:generation_tokens_total'):.0f} tokens, "
              f"{value(metrics, 'vllm:num_preemptions_total'):.0f} preemptions", flush=True)

    async def load(self, server, seconds, rngs):
        self.stop, seen = False, []
        tasks = [self.client(server, next(rngs)) for _ in range(self.args.clients)]
        tasks += [self.meddle(server, next(rngs)), *(self.watch(server, next(rngs), seen) for _ in range(3))]
        tasks = [asyncio.create_task(task) for task in tasks]
        await asyncio.sleep(seconds)
        return tasks, seen

    async def round(self, n):
        args = self.args
        flags = ["--kv-cache-memory-bytes", args.cache, "--max-num-seqs", str(args.seqs), "--max-queued-requests", str(args.queue),
                 "--max-num-batched-tokens", str(args.batched), "--shutdown-timeout", str(args.shutdown_timeout)]
        server = Strait(args, *flags, *(["--no-enable-prefix-caching"] if args.no_prefix else []))
        self.draining = False
        await server.ready()
        empty = await self.quiet(server)
        lost = self.branch(empty, "rounding")
        rngs = (random.Random(f"{args.seed} {n} {i}") for i in range(1 << 20))
        tasks, seen = await self.load(server, args.seconds, rngs)
        self.stop = True
        await asyncio.gather(*tasks)
        await self.settle(server, lost)
        tenth = max(1, len(seen) // 10)
        print("  resident MiB, tenth by tenth: " + " ".join(f"{sum(seen[i:i + tenth]) / tenth:.0f}" for i in range(0, tenth * 10, tenth) if seen[i:i + tenth]))
        tasks, _ = await self.load(server, 5, rngs)
        self.draining, begun = True, time.time()
        server.process.terminate()
        while server.process.poll() is None and time.time() - begun < args.shutdown_timeout + 90:
            await asyncio.sleep(0.05)
        if server.process.poll() != 0:
            self.problem(f"the exit status is {server.process.poll()}")
            server.process.kill()
        print(f"  drained under load in {time.time() - begun:.1f} s", flush=True)
        self.stop = True
        done, late = await asyncio.wait(tasks, timeout=30)
        if late:
            self.problem(f"{len(late)} clients wait for a server that has ended")
        for error in filter(None, (task.exception() for task in done)):
            self.problem(f"a client broke: {error!r}")
        for line in Path(args.log).read_text().split("\n"):
            if " ERROR " in line or "panicked" in line:
                self.problem(f"log: {line}")

    async def run(self):
        await self.reference()
        for n in range(self.args.rounds):
            print(f"round {n + 1} of {self.args.rounds}", flush=True)
            await self.round(n)
        print(", ".join(f"{k}: {v}" for k, v in sorted(self.counts.items())))
        print(f"{len(self.wrong)} wrong")
        return 1 if self.wrong else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--strait", required=True, help="the program")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60, help="of load, each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--items", type=int, default=70, help="requests that are drawn")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--profiles", default="full,cskv-50,cskv-80,cskv-95,cskv-fast")
    parser.add_argument("--cache", default="12MiB", help="--kv-cache-memory-bytes")
    parser.add_argument("--seqs", type=int, default=12, help="--max-num-seqs")
    parser.add_argument("--queue", type=int, default=40, help="--max-queued-requests")
    parser.add_argument("--batched", type=int, default=512, help="--max-num-batched-tokens")
    parser.add_argument("--shutdown-timeout", type=int, default=20)
    parser.add_argument("--no-prefix", action="store_true", help="without prefix cache")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--short", action="store_true", help="short prompts and long answers")
    parser.add_argument("--tiny", action="store_true", help="few tokens, for a device that is slow")
    parser.add_argument("--port", type=int, default=18311)
    parser.add_argument("--log", default=str(Path(tempfile.gettempdir()) / "strait-soak.log"), help="where the server's log goes")
    return asyncio.run(Soak(parser.parse_args()).run())


if __name__ == "__main__":
    sys.exit(main())
