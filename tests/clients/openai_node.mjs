// The openai package of Node as a client: streaming, abort, errors, on the demo model.
import OpenAI from "openai";

const url = process.argv[2];
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
let passed = 0;
function check(name, ok, evidence) {
  if (!ok) {
    console.log(`FAILED ${name}:`, evidence);
    console.log(`${passed} passed, 1 failed`);
    process.exit(1);
  }
  passed += 1;
  console.log(`ok ${name}`);
}

const model = (await client.models.list()).data[0].id;
const answer = await client.chat.completions.create({ model, messages: [{ role: "user", content: "Hello!" }] });
check("chat", answer.choices[0].message.content.length > 0, answer);

let text = "";
let usage;
const stream = await client.chat.completions.create({
  model,
  messages: [{ role: "user", content: "What is the capital of France?" }],
  stream: true,
  stream_options: { include_usage: true },
  cache_profile: "cskv-80",
});
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
check("streaming", text.includes("Paris"), text);
check("usage of a compressed cache", usage.kv_cache.profile === "cskv-80", usage);

async function aborted() {
  const metrics = await (await fetch(`${url}/metrics`)).text();
  return Number(metrics.match(/^vllm:request_success_total\{[^}]*finished_reason="abort"[^}]*\} (\d+)$/m)[1]);
}
const before = await aborted();
const long = await client.completions.create({ model, prompt: "Once", max_tokens: 2000, stream: true, ignore_eos: true });
let seen = 0;
for await (const _ of long) {
  seen += 1;
  if (seen === 5) {
    long.controller.abort();
    break;
  }
}
let after = await aborted();
for (let i = 0; i < 200 && after === before; i++) {
  await new Promise((resolve) => setTimeout(resolve, 50));
  after = await aborted();
}
check("an aborted stream is cancelled", after === before + 1, `${before} aborted before, ${after} after`);

try {
  await client.chat.completions.create({ model, messages: [] });
  check("no messages", false);
} catch (error) {
  check("no messages", error instanceof OpenAI.BadRequestError && error.param === "messages", error);
}
console.log(`${passed} passed, 0 failed`);
