#!/bin/sh
# Compiles every kernel of fastv/cuda.cuh for sm_80, sm_90 and the newest machine that nvcc knows, warnings as errors, and
# prints registers, spills and shared memory of each. Fails on any spill, and on a stack frame. Then, where they are
# installed, LibTorch's adaptor by nvcc and the kernels by hipcc. Nothing runs.
# Ends with 77 where there is no nvcc: skipped, which is not passed.
#   compile.sh [ARCH...]     such as sm_90, or newest; WORK: a folder for what is built
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
: "${WORK:=$root/build/cuda}" "${NVCC:=nvcc}"
command -v "$NVCC" >/dev/null || { echo "fastv/cuda.cuh is NOT TESTED HERE: install nvcc (CUDA 11.8 or newer)"; exit 77; }
mkdir -p "$WORK"
newest=$("$NVCC" --list-gpu-code | grep '^sm_[0-9]*$' | sort -t _ -k 2 -n | tail -n 1)
[ $# -gt 0 ] || set -- sm_80 sm_90 newest
status=0
for arch in "$@"; do
  [ "$arch" != newest ] || arch=$newest
  log=$WORK/$arch.txt
  "$NVCC" -std=c++17 -O3 -I"$root/include" -gencode "arch=compute_${arch#sm_},code=$arch" -Werror all-warnings \
    -Xcompiler -Wall,-Wextra -Xptxas -v -c "$root/tests/cuda/everything.cu" -o "$WORK/everything_$arch.o" >"$log" 2>&1 ||
    { cat "$log"; exit 1; }
  # One line a kernel: its name, registers, bytes of shared memory, of stack and of spills.
  c++filt <"$log" | awk '
    /Compiling entry function/ {
      name = $0; sub(/.*run_kernel</, "", name); sub(/>\(.*/, "", name); gsub(/fastv::(detail::gpu::)?([a-z0-9_]*::)?/, "", name)
    }
    /bytes stack frame/ { stack = $1; spills = $5 + $9 }
    /Used [0-9]+ registers/ {
      registers = shared = 0
      for (i = 1; i < NF; ++i) { if ($(i + 1) ~ /^registers/) registers = $i; if ($(i + 1) == "bytes" && $(i + 2) ~ /^smem/) shared = $i }
      printf "%-44s %4d %7d %6d %6d\n", name, registers, shared, stack, spills
    }' | sort >"$WORK/$arch.table"
  [ -s "$WORK/$arch.table" ] || { cat "$log"; echo "nvcc said nothing of kernels for $arch" >&2; exit 1; }
  printf '%-44s %4s %7s %6s %6s\n' "$arch" regs shared stack spills
  cat "$WORK/$arch.table"
  awk '$NF > 0 || $(NF - 1) > 0 { bad = 1 } END { exit bad }' "$WORK/$arch.table" ||
    { echo "a kernel spills registers, or has a stack frame, on $arch" >&2; status=1; }
done

# The adaptor, against LibTorch's headers; those of builds without CUDA lack one file, which libtorch/ stands in for.
if echo '#include <ATen/core/Tensor.h>' | c++ -std=c++17 -fsyntax-only -x c++ - 2>/dev/null; then
  "$NVCC" -std=c++17 -I"$root/tests/cuda/libtorch" -I"$root/include" -gencode arch=compute_90,code=compute_90 \
    -Werror all-warnings -Xcompiler -Wall,-Wextra -c "$root/tests/cuda/torch.cu" -o "$WORK/torch.o"
  echo "fastv/torch_device.hpp builds with the kernels"
else
  echo "fastv/torch_device.hpp with the kernels is NOT TESTED HERE: install libtorch-dev"
fi
# For warps of 64 threads and of 32; of the device's code as much as its compiler checks before it optimises.
if command -v hipcc >/dev/null; then
  for arch in gfx90a gfx1030; do
    hipcc -std=c++17 --offload-arch=$arch -Wall -Wextra -Werror -Wno-unused-command-line-argument -I"$root/include" \
      -x hip -fsyntax-only "$root/tests/cuda/everything.cu"
    echo "fastv/cuda.cuh builds by hipcc for $arch"
  done
else
  echo "fastv/cuda.cuh by hipcc is NOT TESTED HERE: install hipcc"
fi
exit $status
