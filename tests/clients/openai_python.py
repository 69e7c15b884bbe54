"""The openai package as a client: what its users do, on the demo model."""

import json
import sys
import urllib.request
from pathlib import Path

import openai

url = sys.argv[1]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
passed = 0


def check(name, ok, evidence=None):
    global passed
    if not ok:
        print(f"FAILED {name}: {evidence}")
        print(f"{passed} passed, 1 failed")
        sys.exit(1)
    passed += 1
    print(f"ok {name}")


model = client.models.list().data[0].id
check("models.retrieve", client.models.retrieve(model).id == model)

answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "What is the capital of France?"}])
check("chat", "Paris" in answer.choices[0].message.content, answer)
check("finish", answer.choices[0].finish_reason == "stop", answer)
check("usage", answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0, answer.usage)
check("kv_cache in usage", answer.usage.kv_cache["profile"] == "full" and answer.usage.kv_cache["bytes"] > 0, answer.usage)

prompts = [json.loads(line) for line in (Path(__file__).parent.parent / "golden/demo_prompts.jsonl").read_text().splitlines()]
right = 0
for prompt in prompts:
    for profile in ("full", "cskv-50"):
        answer = client.chat.completions.create(model=model, messages=prompt["messages"], extra_body={"cache_profile": profile})
        if profile == "full":
            check(f"prompt tokens of {prompt['id']}", answer.usage.prompt_tokens == prompt["tokens"], (answer.usage, prompt["tokens"]))
        right += prompt["gold"] in answer.choices[0].message.content
check("retrieves from long prompts", right >= 2 * len(prompts) - 2, f"{right} of {2 * len(prompts)}")

text, usage, finish = "", None, None
stream = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "Tell me a short story."}], stream=True, stream_options={"include_usage": True}
)
for chunk in stream:
    if chunk.choices:
        text += chunk.choices[0].delta.content or ""
        finish = chunk.choices[0].finish_reason or finish
    usage = chunk.usage or usage
check("streaming", len(text) > 10 and finish in ("stop", "length") and usage.completion_tokens > 3, (text, finish, usage))
whole = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Tell me a short story."}])
check("stream and whole agree", whole.choices[0].message.content == text, (whole.choices[0].message.content, text))

same = [
    client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Tell me a short story."}], temperature=1.5, seed=7, n=3, max_tokens=12
    )
    for _ in range(2)
]
texts = [[c.message.content for c in r.choices] for r in same]
check("seeds repeat, choices differ", texts[0] == texts[1] and len(set(texts[0])) > 1, texts)
check("choices are indexed", [[c.index for c in r.choices] for r in same] == [[0, 1, 2]] * 2, same)

logprobs = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "Hello!"}], logprobs=True, top_logprobs=3, max_tokens=4
).choices[0].logprobs.content
said = all(len(t.top_logprobs) == 3 and t.logprob <= 0 and t.bytes is not None for t in logprobs)
check("logprobs", len(logprobs) == 4 and said, logprobs)

echo = client.completions.create(model=model, prompt="The capital of France is", max_tokens=1, echo=True, logprobs=1)
lp = echo.choices[0].logprobs
check("echo with logprobs", lp.token_logprobs[0] is None and len(lp.tokens) == len(lp.token_logprobs) == len(lp.text_offset), lp)
check("echo text", echo.choices[0].text.startswith("The capital of France is"), echo)

# Without it the demo goes on: " 5 6 4 5 6".
stopped = client.completions.create(model=model, prompt="Count: 1 2 3 4", max_tokens=40, stop=["6"], temperature=0)
check("stop strings stop and do not leak", stopped.choices[0].text == " 5 ", stopped)

# Adapters, as their users and the Kubernetes sidecar know them from vLLM.
adapters = [m for m in client.models.list().data if getattr(m, "parent", None)]
check("an adapter is listed with its parent", [(m.id, m.parent) for m in adapters] == [("pirate", model)], adapters)
wanted = json.loads((Path(__file__).parent.parent / "golden/demo-adapters/expected.json").read_text())


def says(adapter, served):
    for case in (c for c in wanted if c["adapter"] == adapter):
        answer = client.chat.completions.create(model=served, messages=case["messages"], temperature=0)
        got = answer.choices[0].message.content
        check(f"{served}: {case['greedy'][:40]!r}", got == case["greedy"] and answer.model == served, got)


def post(path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        return reply.read().decode()


says(None, model)
says("pirate", "pirate")
for name in ("shout", "terse"):
    told = post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": name, "base_model_name": model})
    check(f"load {name}", told == f"Success: LoRA adapter '{name}' added successfully.", told)
    says(name, name)
told = post("/v1/load_lora_adapter", {"lora_name": "terse", "lora_path": "shout", "load_inplace": True})
says("shout", "terse")
told = post("/v1/unload_lora_adapter", {"lora_name": "terse"})
check("unload", told == "Success: LoRA adapter 'terse' removed successfully.", told)

for name, call, kind in [
    ("unknown adapter", lambda: client.chat.completions.create(model="terse", messages=[{"role": "user", "content": "x"}]), openai.NotFoundError),
    ("unknown model", lambda: client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "x"}]), openai.NotFoundError),
    (
        "temperature out of range",
        lambda: client.chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}], temperature=9),
        openai.BadRequestError,
    ),
    (
        "prompt beyond the context",
        lambda: client.completions.create(model=model, prompt=[7] * 20000, max_tokens=1),
        openai.BadRequestError,
    ),
]:
    try:
        call()
        check(name, False, "no error")
    except kind as e:
        check(name, bool(e.message), e)

print(f"{passed} passed, 0 failed")
