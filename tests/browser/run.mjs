// Drives the chat page and the dashboard in Chromium, as a visitor would, at two sizes in dark and light.
//
//   node run.mjs --url http://127.0.0.1:8000 [--api-key KEY]    a running server with the demo model
//   node run.mjs --mock                                         the pages alone, against mock.mjs
//   more: --shots DIR (screenshots)  --only REGEX (tests by name)  --view REGEX  --chromium PATH  --example-seed N
//
// Besides its own checks a test fails on any page error, console error, and request to another origin. What a test
// provokes on purpose (a refusal, a lost server) it names in `allow`. Prints "N passed, N failed"; exits 1 on a failure.
import { existsSync, mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { chromium } from 'playwright-core';
import { startMock } from './mock.mjs';

const { values: args } = parseArgs({ options: {
  url: { type: 'string' }, mock: { type: 'boolean' }, shots: { type: 'string' }, only: { type: 'string' }, view: { type: 'string' },
  chromium: { type: 'string' }, 'api-key': { type: 'string' }, 'example-seed': { type: 'string', default: '7' },
} });
if (Boolean(args.url) === Boolean(args.mock)) {
  console.error('Give either --url of a running server or --mock.');
  process.exit(2);
}

const VIEWS = [
  { name: 'desktop-light', viewport: { width: 1280, height: 820 }, colorScheme: 'light' },
  { name: 'desktop-dark', viewport: { width: 1280, height: 820 }, colorScheme: 'dark' },
  { name: 'phone-light', viewport: { width: 380, height: 760 }, colorScheme: 'light', hasTouch: true },
  { name: 'phone-dark', viewport: { width: 380, height: 760 }, colorScheme: 'dark', hasTouch: true },
].filter((v) => !args.view || new RegExp(args.view).test(v.name));
const ANSWER_MS = 120_000;   // a debug build on a busy machine reads a long prompt slowly

const tests = [];
/** Options: `path`; `mock`: needs the mock's tricks; `once`: independent of size and colours; `allow`: expected console errors. */
const test = (name, options, body) => tests.push({ name, ...options, body });

function ok(condition, message) {
  if (!condition) throw new Error(message);
}

function equal(actual, expected, message) {
  const [a, e] = [JSON.stringify(actual), JSON.stringify(expected)];
  if (a !== e) throw new Error(`${message}: expected ${e}, got ${a}`);
}

// ---- what the tests share ------------------------------------------------------------------------------------
async function say(page, text) {
  await page.fill('#input', text);
  await page.press('#input', 'Enter');
}

/** Waits until nothing streams; the last answer's text. */
async function answered(page, n) {
  await page.waitForFunction((want) => document.querySelectorAll('.msg.assistant').length >= want && !document.querySelector('.streaming') && document.querySelector('#stop').hidden,
    n, { timeout: ANSWER_MS });
  return page.locator('.msg.assistant').nth(n - 1).locator('.answer').first().innerText({ timeout: 2000 }).catch(() => '');
}

async function setting(page, name, value) {
  if (await page.locator('#settings').isHidden()) await page.click('#settings-open');
  await page.fill(`#set-${name}`, value);
}

async function closeSettings(page) {
  if (await page.locator('#settings').isVisible()) await page.click('#settings-close');
}

async function pickProfile(page, name) {
  await page.click('#profile-picker button');
  await page.locator('#profile-picker [role=option]', { has: page.locator('b', { hasText: new RegExp(`^${name}$`) }) }).click();
}

/** The bodies of the completions a page asks for, as it sends them. */
function completions(page) {
  const bodies = [];
  page.on('request', (r) => { if (r.url().endsWith('/v1/chat/completions')) bodies.push(r.postDataJSON()); });
  return bodies;
}

async function paste(page, text) {
  await page.focus('#input');
  await page.evaluate((t) => {
    const data = new DataTransfer();
    data.setData('text/plain', t);
    document.querySelector('#input').dispatchEvent(new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true }));
  }, text);
}

async function dropFile(page, name, bytes) {
  await page.evaluate(([n, b]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(b)], n));
    for (const type of ['dragenter', 'dragover', 'drop']) document.body.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
  }, [name, [...bytes]]);
}

/** Nothing is wider than the screen. */
async function fits(page) {
  const wide = await page.evaluate(() => [...document.querySelectorAll('body *')].filter((el) => {
    const box = el.getBoundingClientRect();
    if (!box.width || box.right <= innerWidth + 1 || el.closest('svg, .sr, .scroller, .compare, pre')) return false;
    return getComputedStyle(el).visibility !== 'hidden';
  }).map((el) => `${el.tagName}.${el.className}`).slice(0, 5));
  equal(wide, [], 'these reach over the right edge');
}

/** Each visible control has a name for a screen reader, and visible text stands out from what is behind it (WCAG AA). */
async function accessible(page) {
  await page.waitForTimeout(350);   // transitions end
  const faults = await page.evaluate(() => {
    const found = [];
    const shown = (el) => el.checkVisibility({ visibilityProperty: true }) && el.getBoundingClientRect().width > 1;
    for (const el of document.querySelectorAll('button, a[href], input, textarea, select')) {
      if (!shown(el)) continue;
      const name = el.getAttribute('aria-label') || el.innerText || [...(el.labels || [])].map((l) => l.innerText || l.textContent).join('') || el.title;
      if (!name.trim()) found.push(`no name: ${el.outerHTML.slice(0, 90)}`);
    }
    const context = Object.assign(document.createElement('canvas'), { width: 1, height: 1 }).getContext('2d', { willReadFrequently: true });
    const rgba = (color) => {
      context.clearRect(0, 0, 1, 1);
      context.fillStyle = color;
      context.fillRect(0, 0, 1, 1);
      return [...context.getImageData(0, 0, 1, 1).data];
    };
    const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (el) => {
      for (let at = el; at; at = at.parentElement) {
        const color = rgba(getComputedStyle(at).backgroundColor);
        if (color[3] > 200) return color;
      }
      return rgba('white');
    };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const el = walker.currentNode.parentElement;
      if (!walker.currentNode.data.trim() || el.closest('svg, :disabled, .stale, code') || !shown(el)) continue;
      let opacity = 1;
      for (let at = el; at; at = at.parentElement) opacity *= Number(getComputedStyle(at).opacity);
      if (opacity < 0.9) continue;
      const [a, b] = [light(rgba(getComputedStyle(el).color)), light(behind(el))].sort((x, y) => y - x);
      const ratio = (a + 0.05) / (b + 0.05);
      if (ratio < 4.5) found.push(`contrast ${ratio.toFixed(2)}: "${walker.currentNode.data.trim().slice(0, 40)}"`);
    }
    return found.slice(0, 6);
  });
  equal(faults, [], 'accessibility');
}

const EVIL = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script><b>bold</b>';

async function unharmed(page) {
  equal(await page.evaluate(() => [document.querySelectorAll('#thread img, #thread script, #thread b:not(.meter b)').length, window.pwned === undefined]), [0, true], 'markup came alive');
}

// ---- chat ----------------------------------------------------------------------------------------------------
test('chat: opens with models, profiles and examples', { path: '/' }, async ({ page, shot }) => {
  ok((await page.innerText('#model-name')).length > 1, 'no model name');
  ok(await page.locator('.card:enabled').count() === 4, 'the examples are not enabled');
  ok(await page.locator('#profile-picker').isVisible(), 'no profile picker');
  await fits(page);
  await accessible(page);
  await shot('welcome');
});

test('chat: a message is answered in a stream', { path: '/' }, async ({ page, shot }) => {
  const sent = completions(page);
  await page.fill('#input', 'What can');
  await page.press('#input', 'Shift+Enter');
  equal(await page.inputValue('#input'), 'What can\n', 'Shift+Enter makes a new line');
  await say(page, 'What can you do?');
  ok((await answered(page, 1)).length > 3, 'no answer');
  equal(sent.length, 1, 'requests');
  equal([sent[0].stream, sent[0].stream_options, sent[0].messages], [true, { include_usage: true, continuous_usage_stats: true }, [{ role: 'user', content: 'What can you do?' }]], 'the request');
  const meter = await page.innerText('.meter');
  for (const part of [/to first token/, /\d prompt tokens?/, /\d tokens? out/]) ok(part.test(meter), `the meter lacks ${part}: ${meter}`);
  ok(/^[1-9]/.test(await page.innerText('#context-text')), 'the context bar shows nothing used');
  await fits(page);
  await accessible(page);
  await shot('answer');
});

test('chat: the long-context example finds its line under cskv-80', { path: '/' }, async ({ page, shot }) => {
  const sent = completions(page);
  await setting(page, 'seed', args['example-seed']);
  await closeSettings(page);
  await pickProfile(page, 'cskv-80');
  await page.click('.card[data-example=lines]');
  await answered(page, 1);
  await page.waitForSelector('.verdict', { timeout: 5000 });
  equal(sent[0].cache_profile, 'cskv-80', 'the profile asked for');
  const content = sent[0].messages[0].content;
  const lines = [...content.matchAll(/^line [a-z]+-[a-z]+: REGISTER_CONTENT is <\d{5}>$/gm)];
  equal([lines.length, new Set(lines.map((l) => l[0].split(':')[0])).size], [150, 150], 'lines and distinct names');
  ok(/\nNow the record is over\. Tell me what is the REGISTER_CONTENT in line [a-z]+-[a-z]+\? I need the number\.$/.test(content), 'the question ends the prompt');
  equal(await page.getAttribute('.verdict', 'data-right'), 'true', `the model's answer "${await page.innerText('.answer')}" is right`);
  const cache = await page.innerText('.row.cache');
  ok(/\d (B|KiB|MiB) in cskv-80/.test(cache) && /(smaller than full|full would take)/.test(cache), `cache bytes: ${cache}`);
  ok(/sealed/.test(await page.innerText('.meter')), 'sealed tokens are shown');
  await fits(page);
  await accessible(page);
  await shot('example');
  await page.getByRole('button', { name: 'Another line' }).click();
  await answered(page, 2);
  equal(await page.locator('.verdict').count(), 2, 'the second question is judged too');
  equal(sent[1].messages.map((m) => m.role), ['user', 'assistant', 'user'], 'the follow-up carries the conversation');
  await shot('follow-up');
});

test('chat: profiles are compared side by side', { path: '/' }, async ({ page, shot }) => {
  await setting(page, 'seed', args['example-seed']);
  await closeSettings(page);
  await page.locator('.segments label', { hasText: /^50$/ }).click();
  await page.click('.card[data-example=lines]');
  await answered(page, 1);
  await page.getByRole('button', { name: 'Compare profiles' }).click();
  await page.waitForFunction(() => document.querySelector('.compare') && document.querySelector('#stop').hidden, null, { timeout: ANSWER_MS });
  const rows = await page.$$eval('.compare tbody tr', (trs) => trs.map((tr) => [tr.children[0].innerText, tr.children[1].innerText.trim(), tr.children[2].innerText]));
  ok(rows.length >= 2 && rows.every(([, result, size]) => /^(right|wrong)$/.test(result) && /\d/.test(size)), `rows: ${JSON.stringify(rows)}`);
  await fits(page);
  await shot('compare');
});

test('chat: stop ends an answer', { path: '/' }, async ({ page, mock }) => {
  if (mock) {
    await say(page, 'slow, please');
    await page.waitForFunction(() => (document.querySelector('.answer') || { innerText: '' }).innerText.length > 20);
    ok(await page.locator('.msg.streaming').isVisible(), 'the answer streams');
  } else {
    await page.locator('.segments label', { hasText: /^400$/ }).click();
    await page.click('.card[data-example=lines]');
  }
  await page.click('#stop');
  await answered(page, 1);
  ok(/You stopped this answer/.test(await page.innerText('#thread')), 'the page says that it was stopped');
  if (mock) {
    await page.waitForTimeout(150);
    const length = (await page.innerText('.answer')).length;
    await page.waitForTimeout(250);
    equal((await page.innerText('.answer')).length, length, 'no more text arrives');
    const aborted = mock.state.aborted;
    ok(aborted > 0, 'the server saw the stream dropped');
    await say(page, 'slow again');
    await page.waitForFunction(() => document.querySelectorAll('.answer').length > 1);
    await page.keyboard.press('Escape');
    await answered(page, 2);
    await page.waitForTimeout(150);
    equal(mock.state.aborted, aborted + 1, 'Escape stops too');
  }
});

test('chat: the theme toggles and is remembered', { path: '/' }, async ({ page, view }) => {
  const look = () => page.evaluate(() => [document.documentElement.dataset.theme, getComputedStyle(document.body).backgroundColor]);
  const other = view.colorScheme === 'dark' ? 'light' : 'dark';
  const before = await look();
  if (view.viewport.width < 800) await page.click('#side-open');
  await page.click('#theme');
  const after = await look();
  equal(after[0], other, 'theme');
  ok(after[1] !== before[1], 'the background did not change');
  await page.reload();
  equal(await look(), after, 'after a reload');
});

test('chat: a long paste becomes an attachment', { path: '/' }, async ({ page, shot }) => {
  const sent = completions(page);
  const text = Array.from({ length: 60 }, (_, i) => `key ${['amber', 'brave', 'calm'][i % 3]}-fox-${i}: ${10000 + i * 7}`).join('\n') + '\n'.padEnd(900, '.');
  await paste(page, 'a short paste is left to the browser');
  equal(await page.locator('#files .chip').count(), 0, 'a short paste is no attachment');
  await paste(page, text);
  await page.waitForFunction(() => /[\d,]+ characters · \d[\d,]* tokens/.test(document.querySelector('#files .size').textContent));
  ok((await page.innerText('#files .size')).startsWith(text.length.toLocaleString('en-US')), 'the chip counts the characters');
  equal(await page.inputValue('#input'), '', 'the text is not in the field');
  await fits(page);
  await shot('attachment');
  await page.click('#files .view');
  equal(await page.locator('#file-text').evaluate((el) => el.textContent), text, 'the text can be read again');
  await page.keyboard.press('Escape');
  await say(page, 'What is it?');
  await answered(page, 1);
  equal(sent[0].messages[0].content, text + '\nWhat is it?', 'the text goes before the question');
  await page.locator('#files .chip').waitFor({ state: 'detached' });
});

test('chat: files are dropped in; what is not text is refused', { path: '/', once: true }, async ({ page }) => {
  await dropFile(page, 'notes.txt', Buffer.from('Grüße: three lines\nof\ntext', 'utf8'));
  await page.waitForSelector('#files .chip');
  equal(await page.innerText('#files .name'), 'notes.txt', 'name');
  await dropFile(page, 'image.png', [0x89, 0x50, 0x4e, 0x47, 0, 1, 2, 0xff]);
  await page.waitForFunction(() => /image\.png is not a text file/.test(document.querySelector('#notice').textContent));
  equal(await page.locator('#files .chip').count(), 1, 'attachments');
  await page.click('#files .icon-btn');
  equal(await page.locator('#files .chip').count(), 0, 'removed');
});

test('chat: markup in a message stays text', { path: '/', once: true }, async ({ page }) => {
  await say(page, EVIL);
  await answered(page, 1);
  equal(await page.innerText('.bubble'), EVIL, 'the message as written');
  await unharmed(page);
});

test('chat: markup from the model stays text', { path: '/' }, async ({ page }) => {
  const text = `${EVIL}\n\n**${EVIL}**\n\n- ${EVIL}\n\n\`\`\`html\n${EVIL}\n\`\`\`\n\n\`<i>code</i>\` [link](javascript:alert(1))`;
  const chunk = (delta, finish) => `data: ${JSON.stringify({ choices: [{ index: 0, delta, finish_reason: finish }] })}\n\n`;
  await page.route('**/v1/chat/completions', (route) => route.fulfill({ status: 200, contentType: 'text/event-stream', body: ': hello\n\n' + chunk({ content: text }, null) + chunk({}, 'stop') + 'data: [DONE]\n\n' }));
  await say(page, 'hello');
  const answer = await answered(page, 1);
  equal(answer.split(EVIL).length - 1, 4, 'each copy is readable');
  equal(await page.locator('.answer a').count(), 0, 'no link is made');
  await unharmed(page);
  await fits(page);
});

test('chat: Markdown is rendered', { path: '/', mock: true }, async ({ page, shot }) => {
  await say(page, 'show markdown');
  await answered(page, 1);
  equal(await page.evaluate(() => ['strong', 'p > code', 'ul > li', 'ol > li', 'pre > code'].map((q) => document.querySelectorAll('.answer ' + q).length)), [1, 1, 2, 2, 1], 'elements');
  ok((await page.innerText('.answer')).includes('snake_case_name and 2 * 3 * 4'), 'underscores and lone stars stay');
  equal(await page.innerText('.answer pre'), 'fn main() {\n    println!("<b>hello</b>");\n}', 'code as written');
  await accessible(page);
  await shot('markdown');
});

test('chat: the event stream is read whatever way it is cut', { path: '/', once: true }, async ({ page }) => {
  const wrong = await page.evaluate(async () => {
    const text = ': keep-alive\n\ndata: {"a":1}\n\ndata:no space\r\n\r\nevent: x\ndata: zwei ü€😀\rdata: lines\r\r: c\n\nid: 7\n\ndata: [DONE]';
    const expected = ['{"a":1}', 'no space', 'zwei ü€😀\nlines', '[DONE]'];
    const raw = new TextEncoder().encode(text);
    const bad = [];
    for (let cut = 0; cut <= raw.length; cut++) {
      for (const step of [cut || 1, 1]) {
        const body = new ReadableStream({ start(c) { for (let i = 0; i < raw.length; i += step) c.enqueue(raw.slice(i, i + step)); c.close(); } });
        const got = [];
        for await (const data of events(body)) got.push(data);
        if (JSON.stringify(got) !== JSON.stringify(expected)) bad.push([step, got]);
      }
    }
    return bad.slice(0, 2);
  });
  equal(wrong, [], 'cuts that read wrongly');
});

test('chat: an example is the same for the same seed', { path: '/', once: true }, async ({ page }) => {
  const facts = await page.evaluate(() => ['lines', 'keys', 'passkey'].map((kind) => {
    const [a, b, c] = [makeExample(kind, 120, 5), makeExample(kind, 120, 5), makeExample(kind, 120, 6)];
    return [a.text === b.text && a.gold === b.gold, a.text !== c.text, a.text.includes(a.gold), judge(a, `it is ${a.gold}.`), judge(a, `${a.gold} or 11`), judge(a, 'none')];
  }));
  equal(facts, Array(3).fill([true, true, true, true, false, false]), 'same, different, holds, right, wrong, none');
});

test('chat: settings go into the request, wrong ones do not', { path: '/', once: true }, async ({ page }) => {
  const sent = completions(page);
  for (const [name, value] of Object.entries({ system: 'Answer briefly.', temperature: '0.5', top_p: '7', max_tokens: '9', seed: '3' })) await setting(page, name, value);
  await closeSettings(page);
  await say(page, 'Hello!');
  await answered(page, 1);
  const { temperature, top_p, max_tokens, seed, messages } = sent[0];
  equal([temperature, top_p ?? null, max_tokens, seed, messages[0]], [0.5, null, 9, 3, { role: 'system', content: 'Answer briefly.' }], 'request');
  await page.reload();
  await page.click('#settings-open');
  equal(await page.inputValue('#set-temperature'), '0.5', 'kept after a reload');
  await page.click('#settings-reset');
  equal(await page.inputValue('#set-temperature'), '', 'reset');
});

test('chat: answer again, edit and send again, copy', { path: '/', once: true }, async ({ page }) => {
  const sent = completions(page);
  await say(page, 'Hello!');
  const first = await answered(page, 1);
  await page.getByRole('button', { name: 'Copy answer' }).click();
  equal((await page.evaluate(() => navigator.clipboard.readText())).trim(), first.trim(), 'copied');
  await page.getByRole('button', { name: 'Answer again' }).click();
  await page.waitForFunction(() => document.querySelector('#stop').hidden);
  await answered(page, 1);
  equal(sent[1].messages, sent[0].messages, 'the same question');
  await page.hover('.msg.user');
  await page.getByRole('button', { name: 'Edit and send again' }).click();
  await page.fill('.edit textarea', 'Who are you?');
  await page.press('.edit textarea', 'Enter');
  await answered(page, 1);
  equal(sent[2].messages, [{ role: 'user', content: 'Who are you?' }], 'the edited question');
  equal(await page.locator('.msg').count(), 2, 'messages');
});

test('chat: conversations are kept, opened again and deleted', { path: '/' }, async ({ page, view, shot }) => {
  const phone = view.viewport.width < 800;
  await say(page, 'Hello!');
  const answer = await answered(page, 1);
  await page.reload();
  await page.waitForSelector('.msg.assistant .answer');
  equal(await page.innerText('.answer'), answer, 'after a reload');
  if (phone) await page.click('#side-open');
  await page.click('#new');
  ok(await page.locator('#welcome').isVisible(), 'a new chat is empty');
  if (phone) await page.click('#side-open');
  await shot('sidebar');
  await fits(page);
  await page.click('.history .open');
  equal(await page.innerText('.answer'), answer, 'opened again');
  if (phone) await page.click('#side-open');
  await page.hover('.history li');
  await page.click('.history .remove');
  equal(await page.locator('.history li').count(), 0, 'deleted');
});

test('chat: the profile picker works from the keyboard', { path: '/' }, async ({ page, shot }) => {
  await page.focus('#profile-picker button');
  await page.keyboard.press('Enter');
  const names = await page.$$eval('#profile-picker [role=option] b', (els) => els.map((el) => el.textContent));
  ok(names.includes('full') && names.length > 1, `profiles: ${names}`);
  ok(/a token/.test(await page.innerText('#profile-picker .menu')), 'bytes a token are shown');
  await fits(page);
  await accessible(page);
  await shot('profiles');
  await page.keyboard.press('End');
  await page.keyboard.press('Enter');
  equal(await page.innerText('#profile-name'), names[names.length - 1], 'the last one is chosen');
  await page.reload();
  await page.waitForSelector('#profile-picker:not([hidden])');
  equal(await page.innerText('#profile-name'), names[names.length - 1], 'and kept');
  await page.focus('#profile-picker button');
  await page.keyboard.press('Enter');
  await page.keyboard.press('Escape');
  equal(await page.locator('.menu').count(), 0, 'Escape closes');
});

test('chat: settings fit', { path: '/' }, async ({ page, shot }) => {
  await page.click('#settings-open');
  await fits(page);
  await accessible(page);
  await shot('settings');
  await page.keyboard.press('Escape');
  ok(await page.locator('#settings').isHidden(), 'Escape closes');
});

test('chat: a full queue is shown with its countdown and tried again', { path: '/', mock: true, allow: [/status of 429/] }, async ({ page, shot }) => {
  await say(page, `busy ${Math.random()}`);
  await page.waitForSelector('.error');
  ok(/The queue is full: 64 requests wait already/.test(await page.innerText('.error')), 'the server\'s words');
  const button = page.locator('.error .btn');
  await page.waitForFunction(() => /Try again in [12] s/.test(document.querySelector('.error .btn').textContent));
  ok(await button.isDisabled(), 'not before its time');
  await accessible(page);
  await shot('busy');
  await page.waitForFunction(() => document.querySelector('.error .btn').textContent === 'Try again', null, { timeout: 5000 });
  await button.click();
  ok((await answered(page, 1)).length > 3, 'the second try is answered');
  equal(await page.locator('.error').count(), 0, 'errors left');
});

test('chat: an error event keeps what had come', { path: '/', mock: true, once: true }, async ({ page }) => {
  await say(page, 'fail midway');
  const text = await answered(page, 1);
  ok(text.length > 3, 'the first words stay');
  ok(/The device was lost while decoding/.test(await page.innerText('.error')), 'the error is shown');
});

test('chat: a cut connection is not taken for an answer', { path: '/', mock: true, once: true, allow: [/ERR_INCOMPLETE_CHUNKED_ENCODING|ERR_CONNECTION/] }, async ({ page }) => {
  await say(page, 'cut off');
  await answered(page, 1);
  ok(await page.locator('.error').isVisible(), 'the page says so');
});

test('chat: a prompt that does not fit is explained', { path: '/', mock: true, once: true, allow: [/status of 400/] }, async ({ page }) => {
  await paste(page, 'far too long '.repeat(6000));
  await page.waitForFunction(() => /tokens too long/.test(document.querySelector('#context-text').textContent));
  await say(page, 'and a question');
  await page.waitForSelector('.error');
  ok(/maximum context length is 16384 tokens/.test(await page.innerText('.error')), 'the server\'s words');
});

test('chat: asks for an API key and goes on with it', { path: '/', mock: true, key: 'sesame', allow: [/status of 401/] }, async ({ page, shot }) => {
  await page.waitForSelector('#key-form:not([hidden])');
  await accessible(page);
  await shot('key');
  await page.fill('#key', 'wrong');
  await page.click('#key-send');
  await page.waitForFunction(() => /did not take/.test(document.querySelector('#key-text').textContent));
  await page.fill('#key', 'sesame');
  await page.click('#key-send');
  await page.waitForSelector('#key-form', { state: 'hidden' });
  await say(page, 'Hello!');
  ok((await answered(page, 1)).length > 3, 'answered');
  equal(await page.evaluate(() => [sessionStorage.getItem('strait.api-key'), JSON.stringify(localStorage).includes('sesame')]), ['sesame', false], 'kept for the session only');
});

test('chat: a key that stops being valid does not lose the question', { path: '/', mock: true, once: true, allow: [/status of 401/] }, async ({ page, mock }) => {
  mock.state.key = 'later';
  await say(page, 'Hello!');
  await page.waitForSelector('#key-form:not([hidden])');
  await page.fill('#key', 'later');
  await page.click('#key-send');
  ok((await answered(page, 1)).length > 3, 'answered with the key');
});

test('chat: a lost server is said and found again', { path: '/', mock: true, once: true, allow: [/ERR_EMPTY_RESPONSE|ERR_CONNECTION|Failed to load resource/] }, async ({ page, mock }) => {
  mock.state.silent = true;
  await say(page, 'Hello!');
  await page.waitForSelector('.error');
  ok(/cannot be reached/.test(await page.innerText('.error')), 'the error says why');
  await page.waitForSelector('#banner:not([hidden])');
  mock.state.silent = false;
  await page.waitForSelector('#banner', { state: 'hidden', timeout: 8000 });
  await page.click('.error .btn');
  ok((await answered(page, 1)).length > 3, 'answered');
});

// ---- dashboard -----------------------------------------------------------------------------------------------
/** A short completion, so that counters move. */
async function traffic(url) {
  const headers = { 'content-type': 'application/json', ...(args['api-key'] && { authorization: `Bearer ${args['api-key']}` }) };
  const { data } = await (await fetch(url + '/v1/models', { headers })).json();
  const reply = await fetch(url + '/v1/chat/completions', { method: 'POST', headers, body: JSON.stringify({ model: data[0].id, stream: true, max_tokens: 24, messages: [{ role: 'user', content: 'What can you do?' }] }) });
  ok(reply.ok, `the server answered ${reply.status} to a completion`);
  await reply.text();
}

test('dashboard: values appear and charts draw', { path: '/dashboard' }, async ({ page, url, shot }) => {
  await page.waitForFunction(() => document.querySelector('#state').dataset.state === 'live');
  await page.waitForTimeout(1200);
  for (let i = 0; i < 2; i++) { await traffic(url); await page.waitForTimeout(1300); }
  const tiles = await page.evaluate(() => Object.fromEntries([...document.querySelectorAll('.tile dd')].map((dd) => [dd.id, dd.textContent])));
  for (const id of ['t-running', 't-waiting', 't-output', 't-input', 't-used']) ok(/^[\d,.]+/.test(tiles[id]), `${id} shows ${tiles[id]}`);
  ok(parseFloat(tiles['t-output']) > 0, `generated tokens/s shows ${tiles['t-output']}`);
  const memory = await page.evaluate(() => [document.querySelectorAll('#memory-stack i').length, [...document.querySelectorAll('#memory-legend li')].map((li) => li.dataset.branch),
    [...document.querySelectorAll('#memory-stack i')].reduce((sum, i) => sum + i.getBoundingClientRect().width, 0) <= document.querySelector('#memory-stack').clientWidth + 1]);
  ok(memory[0] > 0 && memory[1].includes('free') && memory[2], `memory bar: ${JSON.stringify(memory)}`);
  for (const word of ['Model', 'Cache arena', 'Process, resident']) ok(new RegExp(`${word}\\s*[\\d.]+ [KMG]iB`).test(await page.innerText('#others')), `${word} is missing`);
  const rows = await page.$$eval('#profiles-body tr', (trs) => trs.map((tr) => [...tr.children].map((td) => td.textContent)));
  ok(rows.some((r) => r[0].startsWith('full') && /\d/.test(r[1])) && rows.some((r) => /^cskv-80/.test(r[0]) && /−\d+/.test(r[2]) && /^\d/.test(r[3])), `profiles: ${JSON.stringify(rows)}`);
  const drawn = await page.evaluate(() => ['requests', 'tokens', 'ttft', 'itl'].map((id) => {
    const frame = document.querySelector(`#chart-${id} svg`).getBoundingClientRect();
    const lines = [...document.querySelectorAll(`#chart-${id} path.line`)];
    return lines.length > 0 && lines.every((p) => {
      const box = p.getBoundingClientRect();
      return box.top >= frame.top - 2 && box.bottom <= frame.bottom + 2 && box.right <= frame.right + 2 && getComputedStyle(p).stroke !== 'none';
    }) && Math.max(...lines.map((p) => p.getTotalLength())) > 3;
  }));
  equal(drawn, [true, true, true, true], 'charts drawn: requests, tokens, first token, between tokens');
  ok(/\d+(\.\d+)? m?s/.test(await page.innerText('#latency-body')), 'latency quantiles');
  await fits(page);
  await accessible(page);
  await shot('dashboard', true);
});

test('dashboard: the theme toggles and a chart answers the pointer', { path: '/dashboard' }, async ({ page, view }) => {
  await page.waitForFunction(() => document.querySelectorAll('#chart-requests path.line').length > 0, null, { timeout: 8000 });
  const before = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  await page.click('#theme');
  equal(await page.evaluate(() => document.documentElement.dataset.theme), view.colorScheme === 'dark' ? 'light' : 'dark', 'theme');
  ok(await page.evaluate(() => getComputedStyle(document.body).backgroundColor) !== before, 'the background did not change');
  await page.locator('#chart-requests').scrollIntoViewIfNeeded();
  const box = await page.locator('#chart-requests svg').boundingBox();
  await page.mouse.move(box.x + box.width - 6, box.y + 60);
  ok(/Running\s*\d/.test(await page.innerText('#chart-requests .tip')), 'the tip shows values');
});

test('dashboard: metrics text and quantiles are read rightly', { path: '/dashboard', once: true }, async ({ page }) => {
  const got = await page.evaluate(() => {
    const m = parseMetrics('# HELP x y\nx{a="q\\"uo,te}",b="1"} 2\nx{b="2"} 3e1 1700000000\nplain 4\nbad line here\n\ninf +Inf\nh_bucket{le="0.1"} 10\nh_bucket{le="1"} 20\nh_bucket{le="+Inf"} 20\n');
    const h = buckets(m, 'h');
    return [total(m, 'x'), m.get('x')[0].labels.a, total(m, 'plain'), total(m, 'absent') ?? null, total(m, 'inf') === Infinity,
      quantile(0.25, null, h), quantile(0.75, null, h), quantile(0.5, h, h) ?? null, quantile(0.99, [[0.1, 10], [1, 20], [Infinity, 20]], [[0.1, 10], [1, 20], [Infinity, 24]])];
  });
  equal(got, [32, 'q"uo,te}', 4, null, true, 0.05, 0.55, null, 1], 'parsed');
});

test('dashboard: a restarted server does not make rates negative', { path: '/dashboard', once: true }, async ({ page }) => {
  const got = await page.evaluate(() => {
    samples.length = 0;
    const at = (n) => parseMetrics(`vllm:prompt_tokens_total ${n}\nvllm:generation_tokens_total ${n}\nvllm:prefix_cache_queries_total 0\nvllm:prefix_cache_hits_total 0\n`);
    return [[1000, 0], [1100, 1], [1200, 2], [10, 3], [60, 4]].map(([n, s]) => record(at(n), 1e12 + s * 1000).output ?? null);
  });
  equal(got, [null, 100, 100, null, 50], 'tokens/s');
});

test('dashboard: a missing field is a dash', { path: '/dashboard', mock: true, once: true }, async ({ page }) => {
  await page.waitForSelector('#profiles-body tr');
  equal(await page.$eval('#profiles-body tr:last-child td:nth-child(5)', (td) => td.textContent), '–', 'absent requests_now');
});

test('dashboard: capacity is read under either spelling, evictable bytes in the gap', { path: '/dashboard', once: true }, async ({ page }) => {
  const got = await page.evaluate(() => {
    const capacity = { arena_bytes: 100, evictable_bytes: 30, profiles: [{ name: 'full', bytes_per_token: 8, max_tokens_now: 5, max_requests_now: 1 }, { profile: 'cskv-80', bytes_per_token: 1.6, tokens_now: 25 }] };
    const metrics = (window) => parseMetrics(`strait:kv_cache_bytes{branch="window",profile="full"} ${window}\nstrait:kv_cache_bytes{branch="free",profile=""} 20\nstrait:kv_cache_evictable_bytes 30\n`);
    const branches = () => [...document.querySelectorAll('#memory-legend li')].map((li) => li.dataset.branch).join();
    const seen = [renderMemory(metrics(50), capacity).used, branches(), renderMemory(metrics(80), capacity).used, branches()];
    renderProfiles(capacity, new Map([['full', 50]]));
    return [...seen, ...[...document.querySelectorAll('#profiles-body tr')].map((tr) => tr.innerText.replace(/\s+/g, ' '))];
  });
  equal(got, [0.5, 'window,cached,free', 0.5, 'window,free', 'full 8 B exact 5 1 50 B', 'cskv-80 2 B −80 % 25 – 0 B'], 'memory and rows');
});

test('dashboard: draining and a lost server are said, and both pass', { path: '/dashboard', mock: true, allow: [/status of 503/, /ERR_EMPTY_RESPONSE|ERR_CONNECTION/] }, async ({ page, mock, shot }) => {
  const becomes = (state) => page.waitForFunction((s) => document.querySelector('#state').dataset.state === s, state, { timeout: 9000 });
  await becomes('live');
  mock.state.draining = true;
  await becomes('draining');
  ok(/shutting down/.test(await page.innerText('#banner')), 'the banner explains');
  await accessible(page);
  mock.state.draining = false;
  mock.state.silent = true;
  await becomes('away');
  ok(/cannot be reached/.test(await page.innerText('#banner')), 'the banner explains');
  await fits(page);
  await shot('dashboard-away');
  mock.state.silent = false;
  await becomes('live');
  ok(await page.locator('#banner').isHidden(), 'the banner goes');
});

test('dashboard: asks for an API key and goes on with it', { path: '/dashboard', mock: true, once: true, key: 'sesame', allow: [/status of 401/] }, async ({ page }) => {
  await page.waitForSelector('#key-form:not([hidden])');
  await page.fill('#key', 'wrong');
  await page.press('#key', 'Enter');
  await page.waitForFunction(() => /did not take/.test(document.querySelector('#key-text').textContent));
  await page.fill('#key', 'sesame');
  await page.press('#key', 'Enter');
  await page.waitForFunction(() => document.querySelector('#state').dataset.state === 'live' && /^\d/.test(document.querySelector('#t-running').textContent));
  ok(await page.locator('#key-form').isHidden(), 'the form goes');
});

// ---- the runner ----------------------------------------------------------------------------------------------
const executablePath = args.chromium || process.env.CHROMIUM || ['/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'].find((p) => existsSync(p));
if (!executablePath) {
  console.error('No Chromium found: name one with --chromium PATH or in CHROMIUM.');
  process.exit(2);
}
if (args.shots) mkdirSync(args.shots, { recursive: true });
const browser = await chromium.launch({ executablePath, args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'] });

async function runOne(spec, view) {
  // A mock for each test, so that what one changes no other sees; the dashboard's has traffic.
  const mock = args.mock ? await startMock({ load: spec.path === '/dashboard' }) : null;
  if (mock && spec.key) mock.state.key = spec.key;
  const url = mock ? mock.url : args.url.replace(/\/+$/, '');
  const context = await browser.newContext({ ...view, name: undefined, permissions: ['clipboard-read', 'clipboard-write'] });
  if (args['api-key']) await context.addInitScript((key) => sessionStorage.setItem('strait.api-key', key), args['api-key']);
  const page = await context.newPage();
  page.setDefaultTimeout(15_000);
  const problems = [];
  page.on('console', (m) => { if (m.type() === 'error' && !(spec.allow || []).some((a) => a.test(m.text()))) problems.push(`console: ${m.text()} ${m.location().url}`); });
  page.on('pageerror', (e) => problems.push(`page error: ${e.stack || e}`));
  page.on('request', (r) => { if (/^(https?|wss?):/.test(r.url()) && new URL(r.url()).origin !== new URL(url).origin) problems.push(`request to another origin: ${r.url()}`); });
  const shot = async (name, fullPage = false) => { if (args.shots) await page.screenshot({ path: join(args.shots, `${view.name}-${name}.png`), fullPage }); };
  try {
    await page.goto(url + spec.path);
    if (spec.path === '/' && !spec.key) await page.waitForSelector('.card:enabled', { timeout: 30_000, state: 'attached' });
    await spec.body({ page, url, mock, view, shot });
    ok(problems.length === 0, problems.join('\n    '));
    return null;
  } catch (error) {
    await shot(`FAILED-${spec.name.replace(/\W+/g, '-')}`).catch(() => {});
    return [error.message, ...problems].join('\n    ');
  } finally {
    await context.close();
    if (mock) mock.close();
  }
}

let passed = 0;
let failed = 0;
for (const spec of tests) {
  if (args.only && !new RegExp(args.only).test(spec.name)) continue;
  if (spec.mock && !args.mock) continue;
  for (const view of spec.once ? VIEWS.slice(0, 1) : VIEWS) {
    const began = Date.now();
    const fault = await runOne(spec, view);
    if (fault) failed++; else passed++;
    console.log(`${fault ? 'FAILED' : 'ok    '} ${spec.name} [${view.name}] ${((Date.now() - began) / 1000).toFixed(1)} s${fault ? '\n    ' + fault : ''}`);
  }
}
await browser.close();
console.log(`${passed} passed, ${failed} failed`);
process.exit(failed || !passed ? 1 : 0);
