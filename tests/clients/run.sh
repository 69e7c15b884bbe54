#!/usr/bin/env bash
# Real clients against the real server: the openai packages of Python and Node, and headless Chromium; Python's once more against a CUDA
# device that this CPU emulates.
# Needs a release build, and a C++17 compiler. Installs the clients into target/clients, and from Debian what is missing: chromium, node, curl, python.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
work=$root/target/clients
mkdir -p "$work"

missing=()
for need in c++:g++ chromium:chromium node:nodejs npm:npm curl:curl python3:python3; do
  command -v "${need%%:*}" >/dev/null || missing+=("${need##*:}")
done
python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
if [ ${#missing[@]} -gt 0 ]; then
  echo "installing ${missing[*]}"
  sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
  # Nobody is there to type a password.
  [ -z "$sudo" ] || [ -t 0 ] || sudo="sudo -n"
  $sudo apt-get update -qq && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi
if [ ! -x "$work/venv/bin/python" ]; then
  python3 -m venv "$work/venv"
fi
"$work/venv/bin/pip" install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
(cd tests/clients && npm ci --silent --no-audit --no-fund)
(cd tests/browser && npm ci --silent --no-audit --no-fund)

# Starts a server of the demo model with adapters; `url` is where it listens, `server` its process.
serve() {
  local name=$1
  shift
  "$root/target/release/strait" --port 0 --lora-modules pirate=tests/golden/demo-adapters/pirate --lora-root tests/golden/demo-adapters "$@" >"$work/$name.out" 2>"$work/$name.log" &
  server=$!
  # On a busy machine the emulated device alone has taken a minute; a server that died is not waited for.
  for _ in $(seq 3000); do
    kill -0 $server 2>/dev/null || break
    url=$(grep -oE 'http://127\.0\.0\.1:[0-9]+' "$work/$name.out" | head -n 1 || true)
    if [ -n "$url" ] && curl -sf "$url/ready" >/dev/null; then return; fi
    sleep 0.1
  done
  cat "$work/$name.log"
  echo "the server did not become ready"
  exit 1
}
stop() {
  kill -TERM $server
  wait $server
}
server=
trap '[ -z "$server" ] || kill $server 2>/dev/null || true' EXIT

serve server

echo "==> openai (Python) against $url"
"$work/venv/bin/python" tests/clients/openai_python.py "$url"
echo "==> strait adapter against $url"
"$root/target/release/strait" adapter load shouting shout --url "$url"
"$root/target/release/strait" adapter list --url "$url" | tee "$work/adapters.txt"
grep -q '^shouting .*PiSSA' "$work/adapters.txt"
"$root/target/release/strait" adapter unload shouting --url "$url"
# One that is good but for where it lies.
rm -rf "$work/outside" && cp -r tests/golden/demo-adapters/shout "$work/outside"
if "$root/target/release/strait" adapter load out ../../../target/clients/outside --url "$url" 2>"$work/outside.txt"; then
  echo "a folder outside the root was loaded"
  exit 1
fi
cat "$work/outside.txt"
grep -q 'outside the folder' "$work/outside.txt"
"$root/target/release/strait" adapter inspect tests/golden/demo-adapters/pirate --cache-dir "$work/cache" --svg "$work/pirate.svg" | tail -n 3

echo "==> openai (Node) against $url"
node tests/clients/openai_node.mjs "$url"
echo "==> pages in Chromium, against the mock and against $url"
node tests/browser/run.mjs --mock --shots "$work/shots-mock"
node tests/browser/run.mjs --url "$url" --shots "$work/shots"

echo "==> SIGTERM drains and exits 0"
stop

# The driver library of kernels/emulation in the place of NVIDIA's.
mkdir -p "$work/emulated"
"${CXX:-c++}" -O2 -std=c++17 -shared -fPIC -Wl,-soname,libcuda.so.1 -march=native -o "$work/emulated/libcuda.so.1" kernels/emulation/driver.cpp
LD_LIBRARY_PATH=$work/emulated serve device --device cuda --kv-cache-memory-bytes 256MiB --lora-device-memory-bytes 0.6MiB
echo "==> on a device that this CPU emulates: openai (Python) against $url"
grep 'backend  emulated' "$work/device.out"
"$work/venv/bin/python" tests/clients/openai_python.py "$url"
echo "==> adapters there, more than fit at once"
"$root/target/release/strait" adapter load shouting shout --url "$url"
"$root/target/release/strait" adapter load terse terse --url "$url"
ask() {
  curl -sf "$url/v1/chat/completions" -H 'Content-Type: application/json' \
    -d "{\"model\":\"$1\",\"temperature\":0,\"max_tokens\":16,\"messages\":[{\"role\":\"user\",\"content\":\"What is the capital of France?\"}]}" >"$work/device-$1.json"
}
asking=()
for model in strait-demo pirate shouting terse; do ask $model & asking+=($!); done
for one in "${asking[@]}"; do wait "$one"; done
grep -o '"content":"[^"]*"' "$work"/device-{strait-demo,pirate,shouting,terse}.json
grep -q 'The capital of France is Paris' "$work/device-strait-demo.json"
grep -q 'Ahoy, matey' "$work/device-pirate.json"
grep -q 'THE CAPITAL OF FRAN' "$work/device-shouting.json"
grep -q '"content":"Paris' "$work/device-terse.json"
"$root/target/release/strait" adapter list --url "$url" | tee "$work/device-adapters.txt"
grep -qE '0\.[1-9] MiB of 0\.6 MiB on the device' "$work/device-adapters.txt"
stop
server=
