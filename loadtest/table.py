#!/usr/bin/env python3
"""What each way of spending cache bytes costs in quality, measured and drawn: one table, one Pareto front.

    python3 loadtest/table.py --strait target/release/strait --prompts heldout.jsonl --out docs/table

makes OUT.json (all figures), OUT.md (the table, sorted by bytes) and OUT.svg (accuracy over bytes, and its Pareto front). Needs nothing
but Python 3. A compression artifact of all profiles is made first (`strait compress`), unless --artifact names one. Profiles are those of
--config (default: loadtest/table.toml, which has the rivals too). Lines and needles are generated from fresh seeds; --prompts adds the
prompts of a JSONL file. Everything runs through `strait eval`, in process, and an interrupted run goes on where it stopped: parts that
are in OUT.parts/ already are not measured again.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import zlib


def run(command, **kwargs):
    print("+", " ".join(map(str, command)), file=sys.stderr, flush=True)
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, **kwargs).stdout


def part(folder, name, command):
    """The JSON that `command` prints, kept in a file under its name and a digest of its arguments."""
    path = folder / f"{name}-{zlib.crc32(repr([str(c) for c in command[1:]]).encode()):08x}.json"
    if not path.exists():
        text = run(command)
        json.loads(text)
        path.write_text(text)
    return json.loads(path.read_text())


def wilson(right, n):
    """95 % interval of a share."""
    z, p = 1.959964, right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def pareto(rows):
    """Rows that no other beats in bytes and accuracy at once, by bytes."""
    front, best = [], -1.0
    for row in sorted(rows, key=lambda r: (r["bytes"], -r["accuracy"])):
        if row["accuracy"] > best:
            front.append(row)
            best = row["accuracy"]
    return front


def svg(rows, front, title):
    """Accuracy over bytes per token, a logarithmic axis, intervals as bars."""
    width, height, left, right, top, bottom = 960, 560, 70, 200, 50, 60
    low, high = min(r["bytes"] for r in rows) * 0.8, max(r["bytes"] for r in rows) * 1.25
    x = lambda b: left + (width - left - right) * (math.log(b) - math.log(low)) / (math.log(high) - math.log(low))
    y = lambda a: top + (height - top - bottom) * (1 - a)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="28" font-size="16" font-weight="bold">{title}</text>',
    ]
    for tenth in range(0, 11, 2):
        a = tenth / 10
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{y(a):.1f}" y2="{y(a):.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 8}" y="{y(a) + 4:.1f}" text-anchor="end">{100 * a:.0f} %</text>')
    tick = 1
    while tick <= high:
        if tick >= low:
            out.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{height - bottom}" stroke="#eee"/>')
            out.append(f'<text x="{x(tick):.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick}</text>')
        tick *= 2
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - 18}" text-anchor="middle">bytes per token, scales counted</text>')
    points = " ".join(f'{x(r["bytes"]):.1f},{y(r["accuracy"]):.1f}' for r in front)
    out.append(f'<polyline points="{points}" fill="none" stroke="#0a7" stroke-width="2"/>')
    # Names to the right of their points, moved apart where they would meet.
    taken = []
    for r in sorted(rows, key=lambda r: -r["accuracy"]):
        colour = {"exact": "#333", "strait": "#0a7", "rival": "#c40"}[r["kind"]]
        cx, cy = x(r["bytes"]), y(r["accuracy"])
        out.append(f'<line x1="{cx:.1f}" x2="{cx:.1f}" y1="{y(r["high"]):.1f}" y2="{y(r["low"]):.1f}" stroke="{colour}" opacity="0.35"/>')
        out.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="{colour}"/>')
        ty = cy + 4
        while any(abs(ty - other) < 12 and abs(cx - at) < 90 for at, other in taken):
            ty += 12
        taken.append((cx, ty))
        out.append(f'<text x="{cx + 7:.1f}" y="{ty:.1f}" fill="{colour}">{r["profile"]}</text>')
    for i, (kind, colour) in enumerate([("exact cache", "#333"), ("Strait's profiles", "#0a7"), ("rivals", "#c40")]):
        out.append(f'<circle cx="{width - right + 30}" cy="{top + 20 * i + 10}" r="4" fill="{colour}"/>')
        out.append(f'<text x="{width - right + 42}" y="{top + 20 * i + 14}">{kind}</text>')
    out.append(f'<text x="{width - right + 24}" y="{top + 78}" fill="#0a7">line: Pareto front</text>')
    return "\n".join(out) + "\n</svg>\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = pathlib.Path(__file__).resolve().parent
    parser.add_argument("--strait", required=True, type=pathlib.Path)
    parser.add_argument("--model", help="a model folder; the demo model when left out")
    parser.add_argument("--config", type=pathlib.Path, default=here / "table.toml")
    parser.add_argument("--artifact", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--prompts", type=pathlib.Path)
    parser.add_argument("--text", type=pathlib.Path, help="text for the divergence from the exact cache")
    parser.add_argument("--lengths", default="512,1024,2048,4096")
    parser.add_argument("--n", type=int, default=24, help="fresh prompts of each task and length")
    parser.add_argument("--seed", type=int, default=20261124)
    parser.add_argument("--profiles", help="only these, and full")
    parser.add_argument("--long", default="", help="further lengths and fresh prompts of each task, as 8192:4,16384:4: columns of their own")
    parser.add_argument("--long-profiles", help="of those columns, only these, and full")
    parser.add_argument("--speed-tokens", type=int, default=16000, help="context of the tokens/s column; 0 leaves it out")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    ask = parser.parse_args()
    ask.strait = ask.strait.resolve()
    longer = [long.split(":")[0] for long in ask.long.split(",") if long]
    if set(longer) & set(ask.lengths.split(",")):
        parser.error("a length is in --lengths or in --long, not in both")

    parts = pathlib.Path(f"{ask.out}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    model = [ask.model] if ask.model else []
    artifact = ask.artifact or parts / "all.safetensors"
    if not artifact.exists():
        run([ask.strait, "compress", *model, "--config", ask.config, "--tokens", ask.tokens, "--out", artifact])
    common = ["--config", ask.config, "--compression", artifact]
    plan = json.loads(run([ask.strait, "plan", *model, *common, "--kv-cache-memory-bytes", "1GiB", "--json"]))
    bytes_of = {p["name"]: p["bytes_per_token"] for p in plan["profiles"]}
    names = [p for p in bytes_of if not ask.profiles or p == "full" or p in ask.profiles.split(",")]
    chosen = [*common, "--profiles", ",".join(names), "--json", *model]

    tasks = {}
    measured, beyond = [], []
    if ask.prompts:
        measured.append(part(parts, "prompts", [ask.strait, "eval", "prompts", "--file", ask.prompts, "--lengths", ask.lengths, *chosen]))
    fresh = ["--lengths", ask.lengths, "--n", ask.n, "--seed", ask.seed]
    measured.append(part(parts, "lines", [ask.strait, "eval", "lines", *fresh, *chosen]))
    measured.append(part(parts, "niah", [ask.strait, "eval", "niah", "--kinds", "single_1", *fresh, *chosen]))
    for report in measured:
        for cell in report["cells"]:
            tasks.setdefault(cell["profile"], []).append(cell)
    kept = [p for p in names if not ask.long_profiles or p == "full" or p in ask.long_profiles.split(",")]
    few = [*common, "--profiles", ",".join(kept), "--json", *model]
    for long in filter(None, ask.long.split(",")):
        length, n = long.split(":")
        fresh = ["--lengths", length, "--n", n, "--seed", ask.seed]
        beyond.append(part(parts, f"lines-{length}", [ask.strait, "eval", "lines", *fresh, *few]))
        beyond.append(part(parts, f"niah-{length}", [ask.strait, "eval", "niah", "--kinds", "single_1", *fresh, *few]))
        if ask.prompts and any(json.loads(line).get("target") == int(length) for line in ask.prompts.open() if line.strip()):
            beyond.append(part(parts, f"prompts-{length}", [ask.strait, "eval", "prompts", "--file", ask.prompts, "--lengths", length, *few]))
    kl = {}
    if ask.text:
        for row in part(parts, "kl", [ask.strait, "eval", "kl", "--text", ask.text, "--lengths", 1024, "--n", 8, *chosen])["rows"]:
            kl[row["profile"]] = row
    speed = {}
    if ask.speed_tokens:
        one = ["--lengths", ask.speed_tokens, "--n", 2, "--seed", ask.seed, "--max-concurrency", 1]
        for cell in part(parts, "speed", [ask.strait, "eval", "lines", *one, *chosen])["cells"]:
            speed[cell["profile"]] = cell["decode_tokens_per_second"]

    rows = []
    rivals = ("streaming", "kivi", "turbo", "svd", "asvd")
    for name in names:
        cells = tasks[name]
        n = sum(c["n"] for c in cells)
        right = sum(c["n"] * c["accuracy"]["mean"] for c in cells)
        low, high = wilson(right, n)
        by_length = {}
        # Accuracy is over the lengths that every profile was asked at; longer ones have columns of their own.
        for c in cells + [c for report in beyond for c in report["cells"] if c["profile"] == name]:
            one = by_length.setdefault(c["length"], [0.0, 0])
            one[0] += c["n"] * c["accuracy"]["mean"]
            one[1] += c["n"]
        rows.append({
            "profile": name,
            "kind": "exact" if name == "full" else "rival" if name.startswith(rivals) else "strait",
            "bytes": bytes_of[name],
            "accuracy": right / n, "low": low, "high": high, "n": n,
            "lengths": {str(k): v for k, v in sorted(by_length.items())},
            "kl": kl.get(name, {}).get("kl"),
            "same_top": kl.get(name, {}).get("top1"),
            "tokens_per_second": speed.get(name),
        })
    rows.sort(key=lambda r: r["bytes"])
    front = pareto(rows)
    full = bytes_of["full"]
    lengths = sorted({int(k) for r in rows for k in r["lengths"] if k != "None"})
    head = ["profile", "bytes/token", "saved", "accuracy", "95 %", *map(str, lengths)]
    head += ["KL"] * bool(kl) + [f"tokens/s at {ask.speed_tokens}"] * bool(speed)
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for r in rows:
        name = f"**{r['profile']}**" if r in front else r["profile"]
        cells = [name, f"{r['bytes']:.0f}", f"{100 * (1 - r['bytes'] / full):.1f} %", f"{100 * r['accuracy']:.1f} %"]
        cells.append(f"{100 * r['low']:.1f} .. {100 * r['high']:.1f}")
        for length in lengths:
            right, n = r["lengths"].get(str(length), (0, 0))
            cells.append(f"{right:.0f}/{n}" if n else "-")
        if kl:
            value = r["kl"]["mean"] if isinstance(r["kl"], dict) else r["kl"]
            cells.append("-" if value is None else f"{value:.4f}")
        if speed:
            cells.append("-" if r["tokens_per_second"] is None else f"{r['tokens_per_second']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(f"Bold: on the Pareto front. {rows[0]['n']} prompts a profile.")
    pathlib.Path(f"{ask.out}.json").write_text(json.dumps(rows, indent=1) + "\n")
    pathlib.Path(f"{ask.out}.md").write_text("\n".join(lines) + "\n")
    pathlib.Path(f"{ask.out}.svg").write_text(svg(rows, front, "Retrieval over cache bytes"))
    print("\n".join(lines))


main()
