#!/bin/sh
# What including each header costs: preprocessed lines, without the compiler's marks between them; milliseconds of the
# compiler's front end (median of several runs, an empty file's beside it); and bytes of an object file that includes it
# and calls nothing. Beside <vector> and other header-only libraries, in the same run.
#   bench/include_cost.sh [RUNS]     (9 by default)
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/cmake/packages.sh"
need g++ clang pkg-config libeigen3-dev libnanoflann-dev
runs=${1:-9}
case $runs in *[!0-9]* | 0*) echo "RUNS is $runs but must be a positive whole number" >&2; exit 2 ;; esac
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
flags="-std=c++17 -O2 -I$root/include $(pkg-config --cflags eigen3)"
for prefix in "$HOME"/.cache/fastv/*/prefix; do flags="$flags -I$prefix/include"; done  # where cmake/llama_cpp.sh builds ggml

median() {  # COMPILER FILE : of `runs` runs of the front end
  for run in $(seq "$runs"); do
    before=$(date +%s%N)
    $1 $flags -fsyntax-only "$2"
    echo $((($(date +%s%N) - before) / 100000))
  done | sort -n | sed -n "$(((runs + 1) / 2))p" | sed 's/\(.\)$/.\1/; s/^\./0./'
}

row() {  # LABEL INCLUDE...
  label=$1
  shift
  for include in "$@"; do echo "#include $include"; done >row.cpp
  if ! g++ $flags -fsyntax-only row.cpp 2>/dev/null; then
    printf '%-30s not installed here\n' "$label"
    return
  fi
  g++ $flags -c row.cpp -o row.o
  printf '%-30s %9s %10s %10s %9s\n' "$label" "$(g++ $flags -E -P row.cpp | wc -l)" "$(median g++ row.cpp)" \
    "$(median clang++ row.cpp)" "$(size row.o | awk 'NR == 2 { print $4 }')"
}

echo "$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1), $(g++ --version | head -n 1), $(clang++ --version | head -n 1)"
printf '%-30s %9s %10s %10s %9s\n' header lines "g++ ms" "clang++ ms" bytes
row "(nothing)"
row "<vector>" "<vector>"
for header in "$root"/include/fastv/*.hpp; do
  name=$(basename "$header")
  row "fastv/$name" "<fastv/$name>"
done
row "Eigen/Core" "<Eigen/Core>"
row "nanoflann.hpp" "<nanoflann.hpp>"
row "ggml.h" "<ggml.h>"
row "ATen/core/Tensor.h" "<ATen/core/Tensor.h>"
row "nlohmann/json.hpp" "<nlohmann/json.hpp>"
