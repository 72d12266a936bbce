#!/bin/sh
# The re-entrancy program under ThreadSanitizer and MemorySanitizer, each of which stops at its first finding. Not the
# gtest programs: MemorySanitizer would need a gtest and a C++ library built with it, or report what those initialise.
set -eu
cd "$(dirname "$0")/.."
. cmake/packages.sh
need clang
need "libclang-rt-$(clang -dumpversion | cut -d. -f1)-dev"

mkdir -p build/sanitizers
for kind in thread memory; do
  clang++ -std=c++17 -O1 -g -fsanitize=$kind -fno-sanitize-recover=all -Iinclude tests/reentrancy.cpp -pthread \
    -o build/sanitizers/$kind
  printf '%s sanitizer: ' $kind
  TSAN_OPTIONS=halt_on_error=1 build/sanitizers/$kind
done
