#!/usr/bin/env bash
# Real clients against the real server: the openai packages of Python and Node, and headless Chromium.
# Needs a release build. Installs the clients into target/clients, and from Debian what is missing: chromium, node, curl, python.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
work=$root/target/clients
mkdir -p "$work"

missing=()
for need in chromium:chromium node:nodejs npm:npm curl:curl python3:python3; do
  command -v "${need%%:*}" >/dev/null || missing+=("${need##*:}")
done
python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
if [ ${#missing[@]} -gt 0 ]; then
  echo "installing ${missing[*]}"
  sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
  $sudo apt-get update -qq && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi
if [ ! -x "$work/venv/bin/python" ]; then
  python3 -m venv "$work/venv"
fi
"$work/venv/bin/pip" install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
(cd tests/clients && npm ci --silent --no-audit --no-fund)
(cd tests/browser && npm ci --silent --no-audit --no-fund)

log=$work/server.log
"$root/target/release/strait" --port 0 --lora-modules pirate=tests/golden/demo-adapters/pirate --lora-root tests/golden/demo-adapters >"$work/server.out" 2>"$log" &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
for _ in $(seq 100); do
  url=$(grep -oE 'http://127\.0\.0\.1:[0-9]+' "$work/server.out" | head -n 1 || true)
  if [ -n "$url" ] && curl -sf "$url/ready" >/dev/null; then break; fi
  sleep 0.1
done
curl -sf "$url/ready" >/dev/null || { cat "$log"; echo "the server did not become ready"; exit 1; }

echo "==> openai (Python) against $url"
"$work/venv/bin/python" tests/clients/openai_python.py "$url"
echo "==> strait adapter against $url"
"$root/target/release/strait" adapter load shouting shout --url "$url"
"$root/target/release/strait" adapter list --url "$url" | tee "$work/adapters.txt"
grep -q '^shouting .*PiSSA' "$work/adapters.txt"
"$root/target/release/strait" adapter unload shouting --url "$url"
if "$root/target/release/strait" adapter load out ../golden --url "$url"; then echo "a folder outside the root was loaded"; exit 1; fi
"$root/target/release/strait" adapter inspect tests/golden/demo-adapters/pirate --cache-dir "$work/cache" --svg "$work/pirate.svg" | tail -n 3

echo "==> openai (Node) against $url"
node tests/clients/openai_node.mjs "$url"
echo "==> pages in Chromium, against the mock and against $url"
node tests/browser/run.mjs --mock --shots "$work/shots-mock"
node tests/browser/run.mjs --url "$url" --shots "$work/shots"

echo "==> SIGTERM drains and exits 0"
kill -TERM $server
wait $server
trap - EXIT
