#!/bin/sh
# Builds every fuzz target of targets.txt and runs each for so many seconds (60), as many at a time as there are cores.
# A line a target: executions, code covered, findings; status 1 on any finding, whose input is then in build/fuzz.
#
#   sh tests/fuzz/run.sh [SECONDS] [TARGET...]    the targets named, or all
#   sh tests/fuzz/run.sh merge                    takes what build/fuzz has found into tests/fuzz/corpus, minimised
set -eu
cd "$(dirname "$0")/../.."
. cmake/packages.sh
need clang libeigen3-dev nlohmann-json3-dev libstb-dev
need "libclang-rt-$(clang -dumpversion | cut -d. -f1)-dev"

seconds=60
case "${1-}" in
  '') ;;
  merge | [0-9]*) seconds=$1 && shift ;;
  *) echo "usage: sh tests/fuzz/run.sh [SECONDS | merge] [TARGET...]" >&2 && exit 2 ;;
esac
[ $# -gt 0 ] || set -- $(cut -d ' ' -f 1 tests/fuzz/targets.txt)
# As cmake/llama_cpp.sh installs it; a target that needs it is left out, and named, where it is not there.
prefix=${FASTV_LLAMA_CPP:-${XDG_CACHE_HOME:-$HOME/.cache}/fastv/llama.cpp-v0.5.0}/prefix
export GGML="-isystem $prefix/include -L$prefix/lib -Wl,-rpath,$prefix/lib -lggml-base -lggml"
if [ ! -f "$prefix/complete" ]; then
  some=""
  for target in "$@"; do
    if grep -q "^$target .*@ggml" tests/fuzz/targets.txt; then
      echo "$target is NOT RUN: it needs ggml (sh cmake/llama_cpp.sh)"
    else
      some="$some $target"
    fi
  done
  # shellcheck disable=SC2086
  set -- $some
fi
for target in "$@"; do
  grep -q "^$target\( \|$\)" tests/fuzz/targets.txt || { echo "there is no fuzz target $target" >&2; exit 2; }
done

mkdir -p build/fuzz
# float-cast-overflow is not among what clang calls undefined, though it is.
cat >build/fuzz/build_one.sh <<'SCRIPT'
set -eu
target=$1
words=$(sed -n "s/^$target //p" tests/fuzz/targets.txt | sed "s|@ggml|$GGML|")  # sources and flags
folders=$(printf '%s\n' $words | sed -n 's|^\([^-].*\)/[^/]*$|-I\1|p')
clang++ -std=c++17 -O1 -g -DFASTV_LIBFUZZER -fsanitize=fuzzer,address,undefined,float-cast-overflow \
  -fno-sanitize-recover=all -Iinclude -Iexamples/reference $folders -isystem /usr/include/eigen3 \
  -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Werror \
  tests/fuzz/"$target".cpp $words -o build/fuzz/"$target"
SCRIPT
cat >build/fuzz/run_one.sh <<'SCRIPT'
set -eu
target=$1 seconds=$2
mkdir -p build/fuzz/found/"$target" tests/fuzz/corpus/"$target"
status=0
# Sizes beyond the address space must come back as an error, not as the sanitizer's. One core each, so no fork mode.
ASAN_OPTIONS=allocator_may_return_null=1 build/fuzz/"$target" -max_total_time="$seconds" -max_len=1024 -len_control=0 -timeout=20 \
  -rss_limit_mb=3000 -print_final_stats=1 -artifact_prefix=build/fuzz/"$target"- \
  build/fuzz/found/"$target" tests/fuzz/corpus/"$target" >build/fuzz/"$target".log 2>&1 || status=$?
executions=$(sed -n 's/^stat::number_of_executed_units: *//p' build/fuzz/"$target".log)
covered=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' build/fuzz/"$target".log | tail -n 1)
if [ $status = 0 ]; then
  printf '%-14s %9s executions %6s edges  no finding\n' "$target" "$executions" "$covered"
else
  printf '%-14s %9s executions %6s edges  FINDING (build/fuzz/%s.log):\n' "$target" "${executions:-?}" "$covered" "$target"
  grep -E 'FINDING|runtime error|ERROR|Test unit written' build/fuzz/"$target".log | head -n 4 || tail -n 4 build/fuzz/"$target".log
  exit 1
fi
SCRIPT
printf '%s\n' "$@" | xargs -P "$(nproc)" -I{} sh build/fuzz/build_one.sh {}

if [ "$seconds" = merge ]; then
  for target in "$@"; do
    rm -rf build/fuzz/merged
    mkdir -p build/fuzz/merged build/fuzz/found/"$target" tests/fuzz/corpus/"$target"
    # Kept for the edges they reach, not for how often: few files. Names are cut short; crash-* are kept as they are.
    build/fuzz/"$target" -merge=1 -use_counters=0 -max_len=1024 build/fuzz/merged tests/fuzz/corpus/"$target" \
      build/fuzz/found/"$target" >build/fuzz/merge.log 2>&1 || { tail -n 5 build/fuzz/merge.log; exit 1; }
    find tests/fuzz/corpus/"$target" -type f ! -name 'crash-*' -exec rm {} +
    for file in build/fuzz/merged/*; do
      cp "$file" tests/fuzz/corpus/"$target"/"$(basename "$file" | cut -c 1-8)"
    done
    echo "$target: $(ls tests/fuzz/corpus/"$target" | wc -l) inputs, $(du -sb tests/fuzz/corpus/"$target" | cut -f 1) bytes"
  done
  exit 0
fi

printf '%s\n' "$@" | xargs -P "$(nproc)" -I{} sh build/fuzz/run_one.sh {} "$seconds" ||
  { echo "The fuzzers found something: see above." >&2; exit 1; }
