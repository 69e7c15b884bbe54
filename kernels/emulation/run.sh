#!/usr/bin/env bash
# Kernels against references of their own, run on this CPU under the address and undefined-behaviour sanitizers.
set -euo pipefail
cd "$(dirname "$0")"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
# Fibers change stacks, which the first option would take for returns.
export ASAN_OPTIONS=detect_stack_use_after_return=0:detect_leaks=0
for name in linear lora rows prefill rebuild sample; do
    "${CXX:-c++}" -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -march=native -std=c++17 -DSTRAIT_EMULATED -I.. -o "$out/$name" "test_$name.cpp"
    echo "$name"
    "$out/$name"
done
