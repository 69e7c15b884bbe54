#!/usr/bin/env python3
"""Load generator for any OpenAI-compatible server; two servers are measured side by side. Standard library only.

    python3 loadtest/load.py --url http://127.0.0.1:8000 --depths 0,4096,16384 --concurrency 1,4,8
    python3 loadtest/load.py --url http://127.0.0.1:8000 --against http://127.0.0.1:8080 --cache-profile cskv-80 --json out.json
    python3 loadtest/load.py --self-test

A cell is one depth (prompt tokens) at one concurrency. Its streams start together, each with a prompt of its own, so that a
prefix cache shares nothing between them. With --against every cell runs on both servers before the next begins, and
who goes first alternates with each repeat, so that a machine that slows down slows both.

What the columns mean:

    ttft         from sending the request (connection already open) to the first chunk that carries a choice
    prefill/s    prompt tokens not found in a cache, of all streams, over the time to the last stream's first chunk
    dec/stream   (completion tokens - 1) / (last chunk - first chunk), median over streams
    dec/total    those tokens of all streams over the time from the first first chunk to the last chunk
    itl          time between chunks of a stream; with `*` where a chunk carries several tokens (then it is not per token)
    ratio        first server over second; above 1.00 the first is faster, for times as for rates

Prompts get their length from /tokenize (vLLM's {"prompt"}, llama-server's {"content"}), else from usage.prompt_tokens of
short requests. Exit status: 0, 1 when a request failed, 2 on wrong usage.
"""

import argparse
import asyncio
import json
import random
import ssl
import statistics
import sys
import time
import urllib.parse
from dataclasses import dataclass, field

WORDS = ("the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you were "
         "all her she there would their we him been has when who will no more if out so up said what its about than into them can only").split()


# --- HTTP ------------------------------------------------------------------------------------------------------------

class Refused(Exception):
    """The server answered, and not with 200."""

    def __init__(self, status, body):
        super().__init__(f"HTTP {status}: {body[:200]}")
        self.status = status


@dataclass
class Server:
    """One server, and what a request to it carries beside the prompt."""

    url: str
    api_key: str | None = None
    model: str | None = None
    extra: dict = field(default_factory=dict)
    timeout: float = 600.0
    count: object = None  # async text -> prompt tokens, set by `prepare`

    async def open(self, method, path, body=None):
        """Sends one request on a connection of its own. Returns (time of sending, status, async iterator over body bytes)."""
        parts = urllib.parse.urlsplit(self.url)
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        context = ssl.create_default_context() if secure else None
        reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=context, limit=1 << 22)
        payload = b"" if body is None else json.dumps(body).encode()
        base = parts.path.rstrip("/").removesuffix("/v1")  # as clients of the API are configured, or without
        head = [f"{method} {base}{path} HTTP/1.1", f"Host: {parts.netloc}", "Connection: close", "Accept: */*"]
        if body is not None:
            head += ["Content-Type: application/json", f"Content-Length: {len(payload)}"]
        if self.api_key:
            head.append(f"Authorization: Bearer {self.api_key}")
        sent = time.perf_counter()
        writer.write(("\r\n".join(head) + "\r\n\r\n").encode() + payload)
        await writer.drain()
        status = (await reader.readline()).split()
        if len(status) < 2:
            raise ConnectionError("the server closed the connection without an answer")
        headers = {}
        while (line := await reader.readline()) not in (b"\r\n", b"\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        return sent, int(status[1]), body_of(reader, writer, headers)

    async def json(self, method, path, body=None):
        async def exchange():
            _, status, chunks = await self.open(method, path, body)
            data = b"".join([c async for c in chunks]).decode("utf-8", "replace")
            if status != 200:
                raise Refused(status, data)
            return json.loads(data)
        return await asyncio.wait_for(exchange(), self.timeout)


async def body_of(reader, writer, headers):
    """The body's bytes as they arrive, by chunks, by length, or to the end of the connection."""
    try:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
                yield await reader.readexactly(size)
                await reader.readline()
        elif "content-length" in headers:
            left = int(headers["content-length"])
            while left:
                data = await reader.read(min(left, 1 << 16))
                if not data:
                    raise ConnectionError("the connection closed inside the body")
                left -= len(data)
                yield data
        else:
            while data := await reader.read(1 << 16):
                yield data
    finally:
        writer.close()


async def events(chunks):
    """(time of arrival, data) of every server-sent event, whatever the chunk borders."""
    pending, lines = b"", []
    async for chunk in chunks:
        now = time.perf_counter()
        pending += chunk
        while b"\n" in pending:
            line, pending = pending.split(b"\n", 1)
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                lines.append(line[5:].strip())
            elif not line and lines:
                yield now, b"\n".join(lines).decode("utf-8", "replace")
                lines = []


# --- prompts ---------------------------------------------------------------------------------------------------------

async def prepare(server):
    """Finds the model's name and a way to count tokens. Returns words about that way."""
    if server.model is None:
        server.model = (await server.json("GET", "/v1/models"))["data"][0]["id"]
    for kind, body, count in (
        ("/tokenize", lambda t: {"model": server.model, "prompt": t, "add_special_tokens": True}, lambda r: r["count"]),
        ("/tokenize, llama-server's", lambda t: {"content": t, "add_special": True}, lambda r: len(r["tokens"])),
    ):
        async def by_tokenize(text, body=body, count=count):
            return int(count(await server.json("POST", "/tokenize", body(text))))
        try:
            # Both shapes may be accepted and one ignored: a longer text must have more tokens.
            if await by_tokenize("one two three four") > await by_tokenize("one") >= 1:
                server.count = by_tokenize
                return kind
        except (Refused, KeyError, TypeError, ValueError):
            continue

    async def by_usage(text):
        reply = await server.json("POST", "/v1/completions", {"model": server.model, "prompt": text, "max_tokens": 1, **server.extra})
        return int(reply["usage"]["prompt_tokens"])

    # Long prompts would be paid for in prefill: measure a short one and scale.
    short, long = await by_usage(text_of(50, 1)), await by_usage(text_of(450, 1))
    per_word = (long - short) / 400

    async def by_estimate(text):
        return round(short + per_word * (len(text.split()) - 51))
    server.count = by_estimate
    return "usage.prompt_tokens of two short requests, scaled"


def text_of(n_words, seed):
    """A nonce, so that no two prompts share a prefix, then words."""
    rng = random.Random(seed)
    return " ".join([f"[{rng.randrange(10**8):08d}]"] + [rng.choice(WORDS) for _ in range(n_words)])


async def prompt_of(server, depth, seed):
    """A text of `depth` tokens, give or take 2 or half a percent; for depth 0 the shortest there is."""
    if depth <= 0:
        return text_of(1, seed)
    words = max(1, depth * 3 // 4)
    best = None
    for _ in range(8):
        text = text_of(words, seed)
        got = await server.count(text)
        if best is None or abs(got - depth) < abs(best[0] - depth):
            best = (got, text)
        if abs(got - depth) <= max(2, depth // 200) or words == 1 and got > depth:
            break
        words = max(1, round(words * depth / got))
    return best[1]


# --- measuring -------------------------------------------------------------------------------------------------------

@dataclass
class Stream:
    """One request, as its client saw it. Times are from the process's clock, in seconds."""

    sent: float
    first: float
    last: float
    gaps: list
    chunks: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


async def run_stream(server, prompt, max_tokens):
    body = {"model": server.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, "ignore_eos": True, **server.extra}
    sent, status, chunks = await server.open("POST", "/v1/completions", body)
    if status != 200:
        raise Refused(status, b"".join([c async for c in chunks]).decode("utf-8", "replace"))
    arrivals, usage, done = [], None, False
    async for now, data in events(chunks):
        if data == "[DONE]":
            done = True
            break
        event = json.loads(data)
        if "error" in event:
            raise Refused(200, json.dumps(event["error"]))
        usage = event.get("usage") or usage
        # The closing chunk of some servers carries a finish_reason and no token.
        if any(c.get("text") or not c.get("finish_reason") for c in event.get("choices", [])):
            arrivals.append(now)
    if not done:
        raise ConnectionError("the stream ended without [DONE]")
    if not arrivals or usage is None:
        raise ConnectionError("the stream carried no token or no usage")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Stream(sent, arrivals[0], arrivals[-1], [b - a for a, b in zip(arrivals, arrivals[1:])], len(arrivals),
                  usage["prompt_tokens"], cached, usage["completion_tokens"])


async def run_cell(server, prompts, max_tokens):
    """All prompts at once. Returns (streams that ended well, messages of the others)."""
    async def one(prompt):
        return await asyncio.wait_for(run_stream(server, prompt, max_tokens), server.timeout)
    results = await asyncio.gather(*(one(p) for p in prompts), return_exceptions=True)
    streams = [r for r in results if isinstance(r, Stream)]
    failures = [f"{type(r).__name__}: {r}" for r in results if not isinstance(r, Stream)]
    return streams, failures


def percentile(values, share):
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * share // 100) - 1))]


def summary(streams, failures):
    """One cell's figures; rates in tokens a second, times in seconds, None where nothing was measured."""
    out = {"failures": failures, "streams": len(streams)}
    if not streams:
        return out
    begin = min(s.sent for s in streams)
    fresh = sum(s.prompt_tokens - s.cached_tokens for s in streams)
    decoded = sum(s.completion_tokens - 1 for s in streams)
    first, last = min(s.first for s in streams), max(s.last for s in streams)
    rates = [(s.completion_tokens - 1) / (s.last - s.first) for s in streams if s.last > s.first]
    gaps = [g for s in streams for g in s.gaps]
    out.update(
        prompt_tokens=round(statistics.mean(s.prompt_tokens for s in streams)),
        cached_tokens=sum(s.cached_tokens for s in streams),
        completion_tokens=sum(s.completion_tokens for s in streams),
        ttft_p50=statistics.median(s.first - s.sent for s in streams),
        ttft_max=max(s.first - s.sent for s in streams),
        prefill_rate=fresh / (max(s.first for s in streams) - begin),
        decode_rate_stream=statistics.median(rates) if rates else None,
        decode_rate_total=decoded / (last - first) if last > first else None,
        itl_p50=percentile(gaps, 50) if gaps else None,
        itl_p99=percentile(gaps, 99) if gaps else None,
        several_tokens_a_chunk=sum(s.chunks for s in streams) < 0.9 * sum(s.completion_tokens for s in streams),
    )
    return out


FIGURES = ("ttft_p50", "ttft_max", "prefill_rate", "decode_rate_stream", "decode_rate_total", "itl_p50", "itl_p99")


def middle(summaries):
    """The median of each figure over repeats; failures are all kept."""
    good = [s for s in summaries if s["streams"]]
    out = dict(good[0]) if good else {"streams": 0}
    for key in FIGURES:
        values = [s[key] for s in good if s[key] is not None]
        out[key] = statistics.median(values) if values else None
    out["failures"] = [f for s in summaries for f in s["failures"]]
    return out


def ratio(ours, theirs):
    """How many times faster the first is, figure by figure."""
    out = {}
    for key in FIGURES:
        a, b = ours.get(key), theirs.get(key)
        if a and b:
            out[key] = a / b if "rate" in key else b / a
    return out


async def measure(servers, depths, concurrencies, max_tokens, repeats, seed, say, rows=None):
    """Every cell on every server. Returns rows of {"depth", "concurrency", "servers": [figures], "ratio"}, and has appended them to
    `rows` as they came, for whoever is left with those when a server goes away."""
    rows = [] if rows is None else rows
    for server in servers:
        lengths = await prepare(server)
        say(f"{server.url}: model {server.model}, prompt lengths by {lengths}")
        await run_cell(server, [text_of(8, seed)], 4)  # the first request pays for page faults and lazy set-up
    for depth in depths:
        for concurrency in concurrencies:
            kept = [[] for _ in servers]
            for repeat in range(repeats):
                order = list(range(len(servers)))
                for i in order[repeat % len(order):] + order[:repeat % len(order)]:
                    # Both names may be one server with two profiles: no text is sent twice.
                    seeds = [hash((seed, depth, concurrency, repeat, n, i)) for n in range(concurrency)]
                    prompts = [await prompt_of(servers[i], depth, s) for s in seeds]
                    kept[i].append(summary(*await run_cell(servers[i], prompts, max_tokens)))
            figures = [middle(k) for k in kept]
            row = {"depth": depth, "concurrency": concurrency, "servers": figures}
            if len(figures) == 2:
                row["ratio"] = ratio(*figures)
            rows.append(row)
            say(f"depth {depth}, concurrency {concurrency}: done")
    return rows


def table(rows, labels):
    """One aligned table of all cells."""
    def ms(value, mark=""):
        return "-" if value is None else f"{value * 1e3:.1f}{mark}"

    def rate(value):
        return "-" if value is None else f"{value:.1f}"

    head = ["depth", "conc", "server", "prompt", "ttft p50 ms", "ttft max ms", "prefill/s", "dec/stream", "dec/total", "itl p50 ms", "itl p99 ms", "failed"]
    lines = [head]
    for row in rows:
        for label, f in zip(labels, row["servers"]):
            star = "*" if f.get("several_tokens_a_chunk") else ""
            cached = f"+{f['cached_tokens']}c" if f.get("cached_tokens") else ""
            lines.append([str(row["depth"]), str(row["concurrency"]), label, f"{f.get('prompt_tokens', '-')}{cached}", ms(f.get("ttft_p50")),
                          ms(f.get("ttft_max")), rate(f.get("prefill_rate")), rate(f.get("decode_rate_stream")), rate(f.get("decode_rate_total")),
                          ms(f.get("itl_p50"), star), ms(f.get("itl_p99"), star), str(len(f["failures"]))])
        if "ratio" in row:
            lines.append(["", "", "ratio", ""] + [f"x{row['ratio'][k]:.2f}" if k in row["ratio"] else "-" for k in FIGURES] + [""])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) if i == 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip() for line in lines)


# --- command ---------------------------------------------------------------------------------------------------------

def numbers(text):
    try:
        values = [int(x) for x in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 0,4096") from None
    if not values or min(values) < 0:
        raise argparse.ArgumentTypeError("numbers must not be negative")
    return values


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="the server to measure, e.g. http://127.0.0.1:8000")
    parser.add_argument("--against", metavar="URL2", help="a second server, measured cell by cell beside the first")
    parser.add_argument("--depths", type=numbers, default=[0, 4096], help="prompt tokens, e.g. 0,4096,16384")
    parser.add_argument("--concurrency", type=numbers, default=[1], help="streams at once, e.g. 1,4,8")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--model", help="name to ask for (default: the first of /v1/models)")
    parser.add_argument("--against-model")
    parser.add_argument("--api-key")
    parser.add_argument("--against-api-key")
    parser.add_argument("--cache-profile", metavar="P", help="sent as cache_profile to the first server only")
    parser.add_argument("--against-cache-profile", metavar="P", help="sent to the second: the same server twice compares two profiles")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each cell; medians are reported")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds a request may take")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts' words")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--self-test", action="store_true", help="measure two small fake servers of known speed and check the figures")
    args = parser.parse_args(argv)
    if not args.self_test and not args.url:
        parser.error("--url names the server to measure")
    if args.max_tokens < 1 or args.repeats < 1 or 0 in args.concurrency:
        parser.error("--max-tokens, --repeats and every --concurrency must be at least 1")
    return args


def main(argv=None):
    args = arguments(argv)
    if args.self_test:
        return self_test()
    servers = [Server(args.url, args.api_key, args.model, profile(args.cache_profile), args.timeout)]
    if args.against:
        servers.append(Server(args.against, args.against_api_key, args.against_model, profile(args.against_cache_profile), args.timeout))
    rows, ended = [], None
    try:
        asyncio.run(measure(servers, args.depths, args.concurrency, args.max_tokens, args.repeats, args.seed,
                            lambda line: print(line, file=sys.stderr, flush=True), rows))
    except (OSError, Refused, EOFError, ValueError, asyncio.TimeoutError) as error:
        ended = f"load.py: {error or type(error).__name__}"
        if not rows:
            print(ended, file=sys.stderr)
            return 1
        print("measured until it failed:", file=sys.stderr)
    labels = [s.extra.get("cache_profile") or urllib.parse.urlsplit(s.url).netloc for s in servers]
    print(table(rows, labels))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"servers": [{"url": s.url, "model": s.model, **s.extra} for s in servers], "max_tokens": args.max_tokens,
                       "repeats": args.repeats, "cells": rows}, file, indent=1)
    failures = [f for row in rows for figures in row["servers"] for f in figures["failures"]]
    for failure in sorted(set(failures)):
        print(f"failed {failures.count(failure)} times: {failure}", file=sys.stderr)
    if ended:
        print(ended, file=sys.stderr)
    return 1 if failures or ended else 0


def profile(name):
    return {"cache_profile": name} if name else {}


# --- self-test -------------------------------------------------------------------------------------------------------

class Fake:
    """A server of known speed: a token is a word, prefill and decode sleep. `tokenize` is vllm, llama or none."""

    def __init__(self, tokenize, prefill_s=0.05, token_s=0.01, refuse_above=None, key=None, longest=1 << 30):
        self.tokenize, self.prefill_s, self.token_s, self.refuse_above, self.key = tokenize, prefill_s, token_s, refuse_above, key
        self.longest = longest  # bytes of a body, beyond which it goes away without an answer
        self.bodies, self.running = [], 0

    async def start(self):
        self.listener = await asyncio.start_server(self.serve, "127.0.0.1", 0, limit=1 << 22)
        return f"http://127.0.0.1:{self.listener.sockets[0].getsockname()[1]}"

    async def serve(self, reader, writer):
        method, path, _ = (await reader.readline()).decode().split()
        headers = {}
        while (line := (await reader.readline()).decode().strip()):
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"{}")
        if int(headers.get("content-length", 0)) > self.longest:
            return writer.close()
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            self.reply(writer, 401, {"error": {"message": "no key"}})
        elif path == "/v1/models":
            self.reply(writer, 200, {"data": [{"id": "fake"}]})
        elif path == "/tokenize" and self.tokenize == "vllm" and "prompt" in body:
            self.reply(writer, 200, {"count": 1 + len(body["prompt"].split()), "tokens": []})
        elif path == "/tokenize" and self.tokenize == "llama":
            self.reply(writer, 200, {"tokens": [0] * (1 + len(body.get("content", "").split()))})
        elif path == "/v1/completions":
            await self.complete(writer, body)
        else:
            self.reply(writer, 404, {"error": {"message": f"no {method} {path}"}})
        await writer.drain()
        writer.close()

    def reply(self, writer, status, value):
        data = json.dumps(value).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    async def complete(self, writer, body):
        self.bodies.append(body)
        usage = {"prompt_tokens": 1 + len(body["prompt"].split()), "completion_tokens": body["max_tokens"]}
        if not body.get("stream"):
            return self.reply(writer, 200, {"choices": [{"text": "x"}], "usage": usage})
        self.running += 1
        try:
            if self.refuse_above and self.running > self.refuse_above:
                return self.reply(writer, 429, {"error": {"message": "full"}})
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n")
            await asyncio.sleep(self.prefill_s)
            for i in range(body["max_tokens"]):
                if i:
                    await asyncio.sleep(self.token_s)
                last = i == body["max_tokens"] - 1
                event = f'data: {{"choices": [{{"text": "w{i}", "finish_reason": {json.dumps("length" if last else None)}}}]}}\r\n\r\n'.encode()
                # An event over two chunks, and a comment between.
                for part in (event[:9], event[9:] + b": ping\n\n"):
                    writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                await writer.drain()
            tail = f'data: {{"choices": [], "usage": {json.dumps(usage)}}}\n\ndata: [DONE]\n\n'.encode()
            writer.write(f"{len(tail):x}\r\n".encode() + tail + b"\r\n0\r\n\r\n")
        finally:
            self.running -= 1


async def self_test_cells():
    fast, slow = Fake("vllm", 0.05, 0.01, key="k"), Fake("llama", 0.2, 0.04)
    servers = [Server(await fast.start(), "k", None, {"cache_profile": "cskv-80"}, 30), Server(await slow.start(), timeout=30)]
    rows = await measure(servers, [0, 500], [1, 3], 20, 2, 1, lambda line: None)
    assert [(r["depth"], r["concurrency"]) for r in rows] == [(0, 1), (0, 3), (500, 1), (500, 3)]
    for row in rows:
        for figures, fake in zip(row["servers"], (fast, slow)):
            assert figures["failures"] == [] and figures["streams"] == row["concurrency"], figures
            wanted = row["depth"] or 3
            assert abs(figures["prompt_tokens"] - wanted) <= max(2, wanted // 200), (row["depth"], figures["prompt_tokens"])
            # A sleep lasts at least its time, so these bounds hold on any machine; the ratio below has room for a busy one.
            assert figures["ttft_p50"] >= fake.prefill_s and figures["itl_p50"] >= 0.9 * fake.token_s, figures
            assert figures["decode_rate_stream"] <= 1.02 / fake.token_s, figures
            assert figures["decode_rate_total"] > 0.8 * figures["decode_rate_stream"] * row["concurrency"] ** 0.5, figures
            assert not figures["several_tokens_a_chunk"]
        assert 1.5 < row["ratio"]["decode_rate_stream"] < 6 and 1.5 < row["ratio"]["ttft_p50"] < 6, row["ratio"]
    assert all(b.get("cache_profile") == "cskv-80" for b in fast.bodies) and not any("cache_profile" in b for b in slow.bodies)
    prompts = [b["prompt"] for b in fast.bodies if b.get("stream")]
    assert len({p.split()[0] for p in prompts}) == len(prompts), "every prompt starts with a nonce of its own"
    print(table(rows, ["fast", "slow"]))


async def self_test_failures():
    fake = Fake("none", refuse_above=2)
    server = Server(await fake.start(), timeout=30)
    rows = await measure([server], [300], [4], 5, 1, 1, lambda line: None)
    figures = rows[0]["servers"][0]
    assert figures["streams"] == 2 and len(figures["failures"]) == 2 and "429" in figures["failures"][0], figures
    assert abs(figures["prompt_tokens"] - 300) <= 3, figures["prompt_tokens"]
    gone, rows = Server(await Fake("vllm", longest=2000).start() + "/v1/", timeout=30), []
    try:
        await measure([gone], [0, 1000], [1], 2, 1, 1, lambda line: None, rows)
    except ConnectionError:
        assert [r["depth"] for r in rows] == [0] and rows[0]["servers"][0]["streams"] == 1, "what was measured is kept"
    else:
        raise AssertionError("a server that goes away must be noticed")
    denied = Server(await Fake("vllm", key="k").start(), "wrong", timeout=30)
    try:
        await measure([denied], [0], [1], 1, 1, 1, lambda line: None)
    except Refused as error:
        assert error.status == 401
    else:
        raise AssertionError("a wrong key must be refused")


def self_test():
    asyncio.run(self_test_cells())
    asyncio.run(self_test_failures())
    assert percentile([1, 2, 3, 4], 50) == 2 and percentile([5], 99) == 5 and percentile(range(1, 101), 99) == 99
    print("self-test: passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
