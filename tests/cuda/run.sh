#!/bin/sh
# On a machine with a GPU: builds by nvcc alone, tests fastv/cuda.cuh and examples/cuda on the card, looks for faults with
# compute-sanitizer where it is installed, and times the kernels. Ends with a table and a summary; made for 4 minutes on 16
# cores. Exit status: 0; 1 where anything fails; 2 on bad use; 77 without nvcc or a GPU: skipped, which is not passed.
#   run.sh                          all of it, for the GPU that is there
#   run.sh --compile-only [ARCH]    builds only, unoptimised, for ARCH (sm_90 where none is said); needs no GPU
# WORK: a folder for what is built; NVCC: the compiler.
set -eu
cd "$(dirname "$0")/../.."
: "${WORK:=$PWD/build/cuda_run}" "${NVCC:=nvcc}"
export WORK NVCC
compile_only=false arch=native
case ${1:-} in
  "") ;;
  --compile-only) compile_only=true arch=${2:-sm_90} ;;
  *) echo "tests/cuda/run.sh: '$1' is no option: say nothing, or --compile-only [ARCH]" >&2; exit 2 ;;
esac
command -v "$NVCC" >/dev/null || { echo "fastv/cuda.cuh is NOT TESTED HERE: install nvcc (CUDA 11.8 or newer)"; exit 77; }
if [ $compile_only = false ] && ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
  echo "fastv/cuda.cuh is NOT TESTED HERE: nvidia-smi knows no GPU on this machine; --compile-only needs none"
  exit 77
fi
mkdir -p "$WORK"
started=$(date +%s)
step() { printf '=== %s (at %d s)\n' "$1" $(($(date +%s) - started)); }

step "building for $arch, as many files at once as there are cores"
flags="-std=c++17 -Iinclude -Itests/cuda -Itests/cuda/card -arch=$arch -Werror all-warnings -Xcompiler -Wall,-Wextra"
if [ $compile_only = true ]; then flags="$flags -O0 -Xcicc -O0 -Xptxas -O0"; else flags="$flags -O3"; fi
# Since CUDA 12.1 several cores optimise one file.
! "$NVCC" --help 2>/dev/null | grep -q -e '--split-compile ' || flags="$flags --split-compile 0"
export flags
rm -f "$WORK"/*.o "$WORK"/*.log
# Longest first. memory.cpp is the host's alone.
# shellcheck disable=SC2016
printf '%s\n' tests/cuda/score_test.cpp bench/cuda_bench.cu tests/cuda/diverse_test.cpp \
  tests/cuda/batch_test.cpp tests/cuda/select_test.cpp tests/cuda/replay_test.cpp examples/cuda/decoder.cu \
  bench/cuda_prefill_bench.cu tests/cuda/keys_test.cpp tests/cuda/golden_check.cpp tests/cuda/device_test.cu tests/cuda/card/memory.cpp |
  xargs -P "$(nproc)" -n 1 sh -c '
    name=$(basename "$0") language=cu
    [ "$name" != memory.cpp ] || language=c++
    "$NVCC" $flags -x $language -c "$0" -o "$WORK/${name%.*}.o" >"$WORK/$name.log" 2>&1 || { cat "$WORK/$name.log"; exit 255; }'
link() {  # PROGRAM OBJECT... -- by nvcc, which knows where cuBLAS is
  program=$1
  shift
  for object in "$@"; do set -- "$@" "$WORK/$object.o"; shift; done
  "$NVCC" -arch="$arch" "$@" -lcublas -o "$WORK/$program"
}
link device_test device_test memory score_test diverse_test keys_test batch_test select_test replay_test
link golden_check golden_check
link decoder decoder
link cuda_bench cuda_bench
link cuda_prefill_bench cuda_prefill_bench
if [ $compile_only = true ]; then
  step "device_test, golden_check, decoder and both benchmarks are built; nothing ran"
  exit 0
fi

# What is said at the end, a line each; one that begins with FAIL makes the status 1.
: >"$WORK/summary.txt"
run() {  # WHAT LOG COMMAND... -- its last line is what the summary says
  what=$1 log=$WORK/$2.txt status=0
  shift 2
  step "$what"
  timeout 100 "$@" >"$log" 2>&1 || status=$?
  cat "$log"
  if [ $status = 0 ]; then verdict=pass; else verdict="FAIL (status $status)"; fi
  printf '%-6s %-52s %s\n' "$verdict" "$what" "$(grep -v '^ *$' "$log" | tail -n 1 | cut -c 1-100)" >>"$WORK/summary.txt"
}
run "the tests that the host runs over an emulation" device "$WORK/device_test"
run "the tensors of the authors' code" golden "$WORK/golden_check" tests/golden/*.safetensors
run "examples/cuda, small: pruned against masked" tiny "$WORK/decoder" tiny

# Small cases, since either tool makes them many times slower. It refuses some virtual machines' GPUs.
if ! command -v compute-sanitizer >/dev/null; then
  echo "not run: compute-sanitizer is not installed" >>"$WORK/summary.txt"
elif timeout 60 compute-sanitizer "$WORK/decoder" tiny 2>&1 | grep -q "Device not supported"; then
  echo "not run: compute-sanitizer does not support this GPU here" >>"$WORK/summary.txt"
else
  set -- compute-sanitizer --error-exitcode 9 --tool
  run "memcheck, the tests" memcheck "$@" memcheck "$WORK/device_test" --apart CudaReplay CudaGather \
    CudaDiverse.StagesFollow
  run "memcheck, examples/cuda" memcheck_tiny "$@" memcheck "$WORK/decoder" tiny
  run "racecheck, the tests" racecheck "$@" racecheck "$WORK/device_test" CudaReplay CudaSelect.TwoStages \
    CudaScore.ListedAndPriorRows CudaDiverse.StagesFollow CudaDiverse.KeysOf
fi
run "examples/cuda, LLaVA-1.5-7B's shape" 7b "$WORK/decoder" 7b
run "what pruning saves of a prefill" prefill "$WORK/cuda_prefill_bench"
run "cuda_bench" bench "$WORK/cuda_bench"

step "summary"
cat "$WORK/bench.txt"
echo
cat "$WORK/prefill.txt"
echo
cat "$WORK/summary.txt"
if grep -q ^FAIL "$WORK/summary.txt"; then
  echo "Something FAILED on the device; the lines above say what."
  exit 1
fi
echo "Everything that ran on the device passed."
