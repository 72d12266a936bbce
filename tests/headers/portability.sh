#!/bin/sh
# The self-check and examples/minimal.cpp on machines that are not this one: 32 bits, x87 arithmetic, the other byte order,
# 64-bit ARM and Windows, by cross compilers and emulators; on ARM the scores' unit tests too. Installs what is missing.
# (g++-multilib would do for 32 bits, but Debian does not let it stand beside cross compilers.)
#   portability.sh [NAME...]    those alone: i686 s390x aarch64 windows
set -eu
cd "$(dirname "$0")/../.."
. cmake/packages.sh
work=$PWD/build/portability
mkdir -p "$work"

check() {  # NAME RUNNER COMPILER FLAG...
  name=$1 runner=$2 compiler=$3
  shift 3
  echo "$name"
  CXX=$compiler RUNNER=$runner WORK=$work tests/headers/check.sh runs "$name" -static "$@"
}

i686() {
  need g++ clang g++-i686-linux-gnu qemu-user
  # qemu-i386 too, since a kernel may be built without 32-bit programs.
  check i686_x87 qemu-i386 i686-linux-gnu-g++ -O2             # size_t of 32 bits; doubles in registers of 80
  check i686_sse2 qemu-i386 i686-linux-gnu-g++ -O2 -msse2 -mfpmath=sse
  check i686_clang qemu-i386 "clang++ --target=i686-linux-gnu" -O2
}

s390x() {
  need g++ clang g++-s390x-linux-gnu qemu-user
  check s390x qemu-s390x s390x-linux-gnu-g++ -O2              # big-endian: half and bfloat16 by their bits
  check s390x_clang qemu-s390x "clang++ --target=s390x-linux-gnu" -O2 -fno-exceptions -fno-rtti
}

# What an engine on a phone, a Mac or a Graviton runs.
aarch64() {
  need g++ clang g++-aarch64-linux-gnu qemu-user googletest libeigen3-dev
  check aarch64 qemu-aarch64 aarch64-linux-gnu-g++ -O2
  check aarch64_clang qemu-aarch64 "clang++ --target=aarch64-linux-gnu" -O2
  for compiler in aarch64-linux-gnu-g++ "clang++ --target=aarch64-linux-gnu"; do
    $compiler -std=c++17 -O2 -Iinclude -DFASTV_PART=1 -S tests/headers/odr_parts.cpp -o "$work/half.s"
    # Half keys four at a time, by fcvtl; one at a time they take several times as long.
    fast=$(grep -cE 'fcvtl[[:space:]]+v[0-9]+\.4s' "$work/half.s" || :)
    slow=$(grep -cE 'fcvt[[:space:]]+s[0-9]+, h|__extendhf|__gnu_h2f' "$work/half.s" || :)
    echo "$compiler: $fast fcvtl, $slow conversions of one half"
    [ "$fast" -gt 0 ] && [ "$slow" = 0 ] || { echo "half keys are not widened by fcvtl" >&2; exit 1; }
  done
  gtest=/usr/src/googletest/googletest
  aarch64-linux-gnu-g++ -std=c++17 -O1 -static -Iinclude -Itests -isystem /usr/include/eigen3 -isystem $gtest/include \
    -isystem $gtest tests/score_test.cpp tests/counted_new.cpp $gtest/src/gtest-all.cc $gtest/src/gtest_main.cc \
    -o "$work/score_test"
  qemu-aarch64 "$work/score_test" --gtest_brief=1
}

# size_t and long differ in size, printf is another, and windows.h has its macros.
windows() {
  need g++-mingw-w64-x86-64 wine wine64
  export WINEPREFIX="$work/wine" WINEDEBUG=-all
  CXX=x86_64-w64-mingw32-g++ WORK=$work tests/headers/check.sh macros
  check windows wine x86_64-w64-mingw32-g++ -O2
}

for part in ${*:-i686 s390x aarch64 windows}; do $part; done
