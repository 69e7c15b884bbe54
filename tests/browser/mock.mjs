// A server with Strait's surface and no model: it answers by rule, so that the two pages can be tested alone.
// `node mock.mjs [port]` serves until interrupted; `startMock()` gives a test its handle.
//
// A message steers the answer: "slow" streams slowly, "fail midway" sends an error event, "busy" is refused once
// with 429, "cut" drops the connection, "markdown" and "echo:" exercise rendering. Questions about lines, keys and the
// pass key are answered by looking into the prompt. Frames are split at awkward places on purpose.
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createServer } from 'node:http';

const pages = new URL('../../src/server/web/', import.meta.url);
const PROFILES = [
  { name: 'full', bytes_per_token: 2560, default: false },
  { name: 'cskv-50', bytes_per_token: 1280, default: false },
  { name: 'cskv-80', bytes_per_token: 512, default: true },
  { name: 'cskv-95', bytes_per_token: 132, default: false },
];
const WINDOW = 128;
const MAX_LEN = 16384;
const ARENA = 64 * 1024 * 1024;
const TTFT_EDGES = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20];
const ITL_EDGES = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5];

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const tokensOf = (text) => Math.ceil(text.length / 3.1);

/** The policy a strict server can send: inline code only by its hash, no other origin, no inline style attributes. */
function policy(html) {
  const hashes = (tag) => [...html.matchAll(new RegExp(`<${tag}>([\\s\\S]*?)</${tag}>`, 'g'))]
    .map((m) => `'sha256-${createHash('sha256').update(m[1]).digest('base64')}'`).join(' ');
  return `default-src 'none'; script-src ${hashes('script')}; style-src ${hashes('style')}; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'`;
}

function histogram(edges) {
  return { edges, counts: new Array(edges.length + 1).fill(0), sum: 0 };
}

function observe(hist, value) {
  const at = hist.edges.findIndex((edge) => value <= edge);
  hist.counts[at < 0 ? hist.edges.length : at]++;
  hist.sum += value;
}

function histogramText(name, hist) {
  let total = 0;
  const rows = hist.counts.map((n, i) => {
    total += n;
    return `${name}_bucket{model_name="strait-demo",engine="0",le="${i < hist.edges.length ? hist.edges[i] : '+Inf'}"} ${total}`;
  });
  return [`# TYPE ${name} histogram`, ...rows, `${name}_sum{model_name="strait-demo",engine="0"} ${hist.sum}`, `${name}_count{model_name="strait-demo",engine="0"} ${total}`].join('\n');
}

function answerTo(prompt) {
  const question = prompt.slice(prompt.lastIndexOf('\n') + 1);
  const line = /line (\S+?)\?/.exec(question);
  if (line) {
    const found = new RegExp(`line ${line[1]}: REGISTER_CONTENT is <(\\d+)>`).exec(prompt);
    return found ? found[0] : 'There is no such line.';
  }
  const key = /value of key (\S+?)\?/.exec(question);
  if (key) {
    const found = new RegExp(`key ${key[1]}: (\\d+)`).exec(prompt);
    return found ? found[0] : 'There is no such key.';
  }
  const pass = /The pass key is (\d+)/.exec(prompt);
  if (/pass key/.test(question) && pass) return `The pass key is ${pass[1]}.`;
  if (question.startsWith('echo:')) return question.slice(5).trim();
  if (question.includes('markdown')) {
    return 'Some **bold** and `inline` text.\n\n- first\n- second with `code`\n\n1. one\n2. two\n\n```rust\nfn main() {\n    println!("<b>hello</b>");\n}\n```\n\nA line with snake_case_name and 2 * 3 * 4.';
  }
  if (question.includes('slow')) return 'word '.repeat(200).trim();
  return 'I am a tiny language model. I can find lines, keys and values in a long text.';
}

export async function startMock({ port = 0, load = false } = {}) {
  const state = { key: null, draining: false, silent: false, busyFor: 0, refuseOnce: new Set(), requests: [], aborted: 0, quick: false };
  const live = new Map();       // running requests: id -> { profile, tokens }
  const seen = new Set();       // prompts answered, for a cache hit
  const metrics = { prompt: 0, generated: 0, queries: 0, hits: 0, preemptions: 0, finished: {}, rejected: {}, ttft: histogram(TTFT_EDGES), itl: histogram(ITL_EDGES) };
  const started = Date.now();
  let nextId = 1;

  const wave = (period, phase) => (1 + Math.sin((Date.now() - started) / 1000 / period + phase)) / 2;
  const running = () => live.size + (load ? Math.round(3 + 9 * wave(19, 0) + 2 * wave(3, 1)) : 0);
  const waiting = () => (load ? Math.max(0, Math.round(9 * wave(23, 2) - 4)) : 0);

  // With `load`, traffic as of a busy afternoon, so that every chart has something to draw.
  const traffic = load ? setInterval(() => {
    const n = running();
    metrics.prompt += Math.round(n * 60 * (0.7 + 0.6 * Math.random()));
    metrics.generated += Math.round(n * 9 * (0.9 + 0.2 * Math.random()));
    metrics.queries += n * 60;
    metrics.hits += Math.round(n * 60 * (0.5 + 0.2 * wave(31, 1)));
    for (let i = 0; i < n; i++) {
      observe(metrics.itl, 0.006 + 0.02 * Math.random() ** 3 + (Math.random() < 0.02 ? 0.2 : 0));
      if (Math.random() < 0.15) observe(metrics.ttft, 0.06 + 0.5 * Math.random() ** 2 + 0.4 * wave(23, 2));
    }
    if (Math.random() < 0.02) metrics.preemptions++;
    if (waiting() > 3 && Math.random() < 0.1) metrics.rejected.server_overloaded = (metrics.rejected.server_overloaded || 0) + 1;
    if (Math.random() < 0.01) metrics.rejected.context_length_exceeded = (metrics.rejected.context_length_exceeded || 0) + 1;
    metrics.finished.stop = (metrics.finished.stop || 0) + (Math.random() < 0.3 ? 1 : 0);
    metrics.finished.length = (metrics.finished.length || 0) + (Math.random() < 0.05 ? 1 : 0);
  }, 200) : null;

  /** Bytes in use by [profile, branch]. */
  function branches() {
    const held = { full: 0, 'cskv-50': 0, 'cskv-80': 0, 'cskv-95': 0 };
    if (load) Object.assign(held, { full: 900 + 900 * wave(29, 0), 'cskv-50': 1500, 'cskv-80': 26000 + 9000 * wave(19, 0), 'cskv-95': 41000 });
    for (const r of live.values()) held[r.profile] += r.tokens;
    const rows = [];
    let used = 0;
    const add = (profile, branch, size) => {
      const rounded = Math.round(size / 4096) * 4096;
      used += rounded;
      rows.push([profile, branch, rounded]);
    };
    for (const p of PROFILES) {
      const n = held[p.name];
      if (!n) continue;
      const exact = p.name === 'full' ? n : Math.min(n, n * 0.06 + WINDOW);
      add(p.name, 'window', exact * 2560);
      add(p.name, 'sinks', Math.min(n, 4) * 2560);
      if (p.name !== 'full') {
        add(p.name, 'sealed_keys', (n - exact) * p.bytes_per_token * 0.48);
        add(p.name, 'sealed_values', (n - exact) * p.bytes_per_token * 0.48);
        add(p.name, 'metadata', (n - exact) * p.bytes_per_token * 0.04);
      }
    }
    add('', 'workspace', 1.5 * 1024 * 1024);
    add('', 'cached', load ? (4 + 3 * wave(41, 0)) * 1024 * 1024 : seen.size * 65536);
    return { rows, free: Math.max(0, ARENA - used) };
  }

  function metricsText() {
    const label = '{model_name="strait-demo",engine="0"}';
    const { rows, free } = branches();
    const lines = [
      '# HELP vllm:num_requests_running Requests in the running batch.', '# TYPE vllm:num_requests_running gauge',
      `vllm:num_requests_running${label} ${running()}`, `vllm:num_requests_waiting${label} ${waiting()}`,
      `vllm:kv_cache_usage_perc${label} ${1 - (free + rows.find((r) => r[1] === 'cached')[2]) / ARENA}`,
      `vllm:prompt_tokens_total${label} ${metrics.prompt}`, `vllm:generation_tokens_total${label} ${metrics.generated}`,
      `vllm:prefix_cache_queries_total${label} ${metrics.queries}`, `vllm:prefix_cache_hits_total${label} ${metrics.hits}`,
      `vllm:num_preemptions_total${label} ${metrics.preemptions}`,
      ...Object.entries(metrics.finished).map(([reason, n]) => `vllm:request_success_total{model_name="strait-demo",engine="0",finished_reason="${reason}"} ${n}`),
      ...Object.entries(metrics.rejected).map(([code, n]) => `strait:requests_rejected_total{code="${code}"} ${n}`),
      ...rows.map(([profile, branch, size]) => `strait:kv_cache_bytes{branch="${branch}",profile="${profile}"} ${size}`),
      `strait:kv_cache_bytes{branch="free",profile=""} ${free}`,
      'strait:model_bytes 4.85e+06', `strait:process_resident_bytes ${150e6 + Math.round(3e6 * wave(13, 0))}`,
      histogramText('vllm:time_to_first_token_seconds', metrics.ttft), histogramText('vllm:inter_token_latency_seconds', metrics.itl),
    ];
    return lines.join('\n') + '\n';
  }

  function sendJson(response, status, body, headers = {}) {
    response.writeHead(status, { 'content-type': 'application/json', 'x-request-id': `mock-${nextId}`, ...headers });
    response.end(JSON.stringify(body));
  }

  function refuse(response, status, code, message, headers) {
    metrics.rejected[code] = (metrics.rejected[code] || 0) + 1;
    sendJson(response, status, { error: { message, type: status < 500 ? 'invalid_request_error' : 'server_error', param: null, code } }, headers);
  }

  /** Writes text in pieces that do not respect frames, lines or characters. */
  async function writeRagged(response, text, slow) {
    const data = Buffer.from(text, 'utf8');
    if (slow || data.length < 8) { response.write(data); return; }
    const cut = 1 + (data.length * 7) % (data.length - 1);
    response.write(data.subarray(0, cut));
    await sleep(1);
    response.write(data.subarray(cut));
  }

  async function chat(request, response, body) {
    const prompt = body.messages.map((m) => m.content).join('\n');
    const question = body.messages[body.messages.length - 1].content;
    state.requests.push(body);
    if (state.draining) return refuse(response, 503, 'draining', 'The server is shutting down and takes no new requests.');
    if (question.includes('busy') && !state.refuseOnce.has(question)) {
      state.refuseOnce.add(question);
      return refuse(response, 429, 'server_overloaded', 'The queue is full: 64 requests wait already.', { 'retry-after': '2' });
    }
    const n = tokensOf(prompt) + 8;
    if (n > MAX_LEN) return refuse(response, 400, 'context_length_exceeded', `This model's maximum context length is ${MAX_LEN} tokens. However, your prompt contains ${n} input tokens.`);
    const profile = PROFILES.find((p) => p.name === body.cache_profile) || PROFILES.find((p) => p.default);
    const head = prompt.slice(0, 400) + profile.name;
    const cached = seen.has(head) ? Math.floor((n - 40) / 64) * 64 : 0;
    seen.add(head);
    const id = `chatcmpl-${nextId++}`;
    live.set(id, { profile: profile.name, tokens: n });
    let gone = false;
    response.on('close', () => { if (!response.writableFinished) { gone = true; state.aborted++; } live.delete(id); });
    response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-cache' });
    response.write(': keep-alive\n\n');
    const usage = (out, final) => ({
      prompt_tokens: n, completion_tokens: out, total_tokens: n + out, prompt_tokens_details: { cached_tokens: cached },
      ...(final && { kv_cache: profile.name === 'full' ? { profile: 'full', bytes: (n + out) * 2560, sealed_tokens: 0, window_tokens: n + out }
        : { profile: profile.name, bytes: Math.min(n + out, WINDOW) * 2560 + Math.max(0, n + out - WINDOW) * profile.bytes_per_token, sealed_tokens: Math.max(0, n + out - WINDOW), window_tokens: Math.min(n + out, WINDOW) } }),
    });
    const frame = (choices, use) => `data: ${JSON.stringify({ id, object: 'chat.completion.chunk', created: Math.floor(Date.now() / 1000), model: body.model, choices, usage: use })}\n\n`;
    const slow = question.includes('slow');
    const first = state.quick ? 20 : Math.min(1500, 40 + (n - cached) * 0.15);
    await sleep(first);
    if (gone) return;
    observe(metrics.ttft, first / 1000);
    await writeRagged(response, frame([{ index: 0, delta: { role: 'assistant', content: '' }, finish_reason: null }], usage(0)), slow);
    let out = 0;
    for (const piece of answerTo(prompt).match(/\s*\S{1,4}/g) || []) {
      if (gone) return;
      if (question.includes('fail midway') && out === 6) {
        response.write(`: the next frame is an error\r\n\r\ndata: ${JSON.stringify({ error: { message: 'The device was lost while decoding.', type: 'server_error', param: null, code: 'device_lost' } })}\r\n\r\n`);
        return response.end('data: [DONE]\n\n');
      }
      if (question.includes('cut off') && out === 6) return response.destroy();
      out++;
      await writeRagged(response, frame([{ index: 0, delta: { content: piece }, finish_reason: null }], usage(out)), slow);
      const gap = slow ? 60 : 8;
      await sleep(gap);
      observe(metrics.itl, gap / 1000);
    }
    await writeRagged(response, frame([{ index: 0, delta: {}, finish_reason: out >= (body.max_tokens || Infinity) ? 'length' : 'stop' }], usage(out)), slow);
    await writeRagged(response, ': keep-alive\n\n' + frame([], usage(out, true)), slow);
    metrics.prompt += n; metrics.generated += out; metrics.queries += n; metrics.hits += cached;
    metrics.finished.stop = (metrics.finished.stop || 0) + 1;
    response.end('data: [DONE]\n\n');
  }

  const server = createServer(async (request, response) => {
    const path = new URL(request.url, 'http://mock').pathname;
    if (state.silent) return request.socket.destroy();
    const page = { '/': 'chat.html', '/dashboard': 'dashboard.html' }[path];
    if (page) {
      const html = readFileSync(new URL(page, pages), 'utf8');
      response.writeHead(200, { 'content-type': 'text/html; charset=utf-8', 'content-security-policy': policy(html), 'x-content-type-options': 'nosniff', 'referrer-policy': 'no-referrer' });
      return response.end(html);
    }
    if (path === '/ready') return state.draining ? sendJson(response, 503, { status: 'draining' }) : sendJson(response, 200, { status: 'ready' });
    if (state.key && request.headers.authorization !== `Bearer ${state.key}`) {
      return refuse(response, 401, 'invalid_api_key', 'This server needs an API key: send it as "Authorization: Bearer KEY".');
    }
    if (path === '/metrics') {
      response.writeHead(200, { 'content-type': 'text/plain; version=0.0.4' });
      return response.end(metricsText());
    }
    if (path === '/v1/models') {
      const card = (id, more) => ({ id, object: 'model', created: 1760000000, owned_by: 'strait', max_model_len: MAX_LEN, cache_profiles: PROFILES, ...more });
      return sendJson(response, 200, { object: 'list', data: [card('strait-demo'), card('registers-lora', { parent: 'strait-demo' })] });
    }
    if (path === '/v1/capacity') {
      const { free } = branches();
      const profiles = PROFILES.map((p) => ({ profile: p.name, default: p.default, bytes_per_token: p.bytes_per_token, tokens_now: Math.min(MAX_LEN, Math.floor(free / p.bytes_per_token)), requests_now: Math.floor(free / p.bytes_per_token / MAX_LEN) }));
      delete profiles[3].requests_now;   // the pages must stand a field that is not there
      return sendJson(response, 200, { object: 'capacity', arena_bytes: ARENA, free_bytes: free, request_tokens: MAX_LEN, profiles });
    }
    if (request.method === 'POST') {
      let text = '';
      for await (const part of request) text += part;
      const body = JSON.parse(text);
      if (path === '/tokenize') return sendJson(response, 200, { count: tokensOf(body.prompt), max_model_len: MAX_LEN, tokens: [] });
      if (path === '/v1/chat/completions') return chat(request, response, body);
    }
    refuse(response, 404, 'not_found', `There is nothing at ${path}.`);
  });
  await new Promise((resolve) => server.listen(port, '127.0.0.1', resolve));
  return {
    url: `http://127.0.0.1:${server.address().port}`,
    state,
    close: () => { clearInterval(traffic); server.closeAllConnections(); server.close(); },
  };
}

if (process.argv[1] === new URL(import.meta.url).pathname) {
  const mock = await startMock({ port: Number(process.argv[2] || 8099), load: true });
  console.log(mock.url);
}
