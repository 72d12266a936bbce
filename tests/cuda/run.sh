#!/bin/sh
# On a machine with a GPU: builds by nvcc alone, tests fastv/cuda.cuh and examples/cuda on the card, looks for faults with
# compute-sanitizer where it is installed, and times the kernels. Ends with one table and a summary; under 4 minutes on 16
# cores. Exit status: 0; 1 where anything fails; 77 where there is no nvcc or no GPU: skipped, which is not passed.
#   run.sh                          all of it, for the machine's own GPU
#   run.sh --compile-only [ARCH]    only builds, unoptimised, for ARCH (sm_90 where none is said); needs no GPU
# WORK: a folder for what is built; NVCC: the compiler.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
: "${WORK:=$root/build/cuda_run}" "${NVCC:=nvcc}"
compile_only=false arch=native
case ${1:-} in
  --compile-only) compile_only=true arch=${2:-sm_90} ;;
  "") ;;
  *) echo "tests/cuda/run.sh: '$1' is no option: say nothing, or --compile-only [ARCH]" >&2; exit 2 ;;
esac
command -v "$NVCC" >/dev/null || { echo "fastv/cuda.cuh is NOT TESTED HERE: install nvcc (CUDA 11.8 or newer)"; exit 77; }
if [ $compile_only = false ] && ! nvidia-smi -L >/dev/null 2>&1; then
  echo "fastv/cuda.cuh is NOT TESTED HERE: this machine has no GPU that nvidia-smi knows; --compile-only needs none"
  exit 77
fi
mkdir -p "$WORK"
started=$(date +%s)
said() { printf '%4d s  %s\n' $(($(date +%s) - started)) "$1"; }

# Builds objects side by side, as many as there are cores.
flags="-std=c++17 -I$root/include -I$root/tests/cuda/card -I$root/tests/cuda -arch=$arch -Werror all-warnings -Xcompiler -Wall,-Wextra"
if [ $compile_only = true ]; then flags="$flags -O0 -Xcicc -O0 -Xptxas -O0"; else flags="$flags -O3"; fi
objects="tests/cuda/score_test.cpp bench/cuda_bench.cu tests/cuda/batch_test.cpp examples/cuda/decoder.cu
  tests/cuda/select_test.cpp tests/cuda/replay_test.cpp tests/cuda/device_test.cu"
rm -f "$WORK"/*.o
"$NVCC" $flags -c "$root/tests/cuda/card/memory.cpp" -o "$WORK/memory.o"
printf '%s\n' $objects | xargs -P "$(nproc)" -I SOURCE sh -c '
  name=$(basename SOURCE); "$0" "$@" -x cu -c "$ROOT/SOURCE" -o "$WORK/${name%.*}.o" >"$WORK/$name.log" 2>&1 ||
    { cat "$WORK/$name.log" >&2; exit 255; }' "$NVCC" $flags
