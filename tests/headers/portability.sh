#!/bin/sh
# The self-check and examples/minimal.cpp on machines that are not this one: 32 bits, x87 arithmetic, and the other byte
# order, by cross compilers and an emulator. Installs what is missing. (g++-multilib would do for 32 bits, but Debian
# does not let it stand beside cross compilers.)
set -eu
cd "$(dirname "$0")/../.."
. cmake/packages.sh
need g++ clang g++-i686-linux-gnu g++-s390x-linux-gnu qemu-user

check() {  # NAME RUNNER COMPILER FLAG...
  name=$1 runner=$2 compiler=$3
  shift 3
  echo "$name"
  CXX=$compiler RUNNER=$runner WORK=$PWD/build/portability tests/headers/check.sh runs "$name" -static "$@"
}

# qemu-i386 too, since a kernel may be built without 32-bit programs.
check i686_x87 qemu-i386 i686-linux-gnu-g++ -O2               # size_t of 32 bits; doubles in registers of 80
check i686_sse2 qemu-i386 i686-linux-gnu-g++ -O2 -msse2 -mfpmath=sse
check i686_clang qemu-i386 "clang++ --target=i686-linux-gnu" -O2
check s390x qemu-s390x s390x-linux-gnu-g++ -O2                # big-endian: half and bfloat16 by their bits
check s390x_clang qemu-s390x "clang++ --target=s390x-linux-gnu" -O2 -fno-exceptions -fno-rtti
