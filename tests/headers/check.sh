#!/bin/sh
# One check of the headers as a user's compiler sees them; ctest runs each (label `headers`).
#   check.sh header NAME          alone, twice, without a warning, in ASCII, within its budget, leaking no macro
#   check.sh odr                  two translation units of one program, built as differently as may be
#   check.sh runs NAME FLAG...    the self-check and examples/minimal.cpp, built with FLAGs, say what they should
#   check.sh all                  all of these, for compilers that are not the build's
#   check.sh refuses CASE         a case of must_not_compile.cpp: its good branch builds, its bad one says what to do
# CXX: the compiler. WORK: a folder for what is built. ENGINES: folders of engines' headers. RUNNER: what runs
# programs for another machine.
# Ends with 77 where the engine of an adaptor is not installed: skipped, which is not passed.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
: "${CXX:=c++}" "${WORK:=$root/build/headers}" "${ENGINES:=}" "${RUNNER:=}"
export CXX WORK ENGINES RUNNER
self=$root/tests/headers/check.sh
mkdir -p "$WORK"
cd "$WORK"
include=$root/include
# As the user does: the headers by plain -I, so that the compiler does not look away; engines as SYSTEM.
warnings="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wold-style-cast -Wundef -Wnon-virtual-dtor
          -Wdouble-promotion -Werror"
system=""
for folder in $(pkg-config --cflags-only-I eigen3 2>/dev/null) $ENGINES; do system="$system -isystem ${folder#-I}"; done

fail() { echo "$*" >&2; exit 1; }
compiles() { $CXX $system -I"$include" -fsyntax-only "$@"; }
# Lines of code, without the compiler's own marks between them.
lines() { $CXX -std=c++17 $system -I"$include" -E -P -x c++ "$1" | wc -l; }

# The standard's and the engine's headers that NAME includes, itself or through fastv's.
foreign_includes() {
  printf '#include <fastv/%s.hpp>\n' "$1" >deps_$1.cpp
  $CXX -std=c++17 $system -I"$include" -MM deps_$1.cpp | tr ' \\' '\n\n' | grep "^$include/fastv/" | xargs cat |
    grep -h '^#include <' | grep -v '<fastv/' | sort -u
}

header() {
  name=$1 file=$include/fastv/$1.hpp
  # The engine's header, included here or by a header of ours that is.
  engine=$(sed -n 's|^#include "\(.*\)"|'"$include"'/fastv/\1|p' "$file" | xargs cat "$file" |
    sed -n 's/^#include <\([^>]*[/.][^>]*\)>.*/\1/p' | head -n 1)
  if [ -n "$engine" ] && ! echo "#include <$engine>" | compiles -std=c++17 -x c++ - 2>/dev/null; then
    echo "fastv/$name.hpp is NOT TESTED HERE: install what has <$engine>, or name its folder in FASTV_ENGINE_INCLUDES"
    exit 77
  fi
  if LC_ALL=C grep -n '[^ -~	]' "$file"; then fail "fastv/$name.hpp has characters that are not ASCII"; fi

  printf '#include <fastv/%s.hpp>\n#include <fastv/%s.hpp>\n' "$name" "$name" >twice_$name.cpp
  # An engine's own headers may need no newer standard than 17, and may not build under it.
  for standard in 17 20 23; do
    [ $standard = 23 ] && ! echo | compiles -std=c++23 -x c++ - 2>/dev/null && standard=2b
    if [ -n "$engine" ] && ! echo "#include <$engine>" | compiles -std=c++$standard -x c++ - 2>/dev/null; then
      echo "<$engine> itself does not build as C++$standard"
      continue
    fi
    compiles -std=c++$standard $warnings twice_$name.cpp || fail "fastv/$name.hpp does not stand alone as C++$standard"
  done

  foreign_includes "$name" >foreign_$name.cpp
  for part in foreign twice; do
    $CXX -std=c++17 $system -I"$include" -dM -E -x c++ ${part}_$name.cpp | sort >macros_${part}_$name
  done
  diff macros_foreign_$name macros_twice_$name | grep '^[<>]' | grep -v '^> #define FASTV_' >leaks_$name || :
  if [ -s leaks_$name ]; then
    cat leaks_$name
    fail "fastv/$name.hpp defines (>) or takes away (<) these macros"
  fi

  count=$(lines twice_$name.cpp)
  budget=""
  case $name in
    view) budget=3500 ;;
    fastv) budget=20000 ;;
  esac
  if [ -n "$engine" ]; then  # 1,000 lines above the engine's header, and above the core's where it includes all of it
    echo "#include <$engine>" >beside_$name.cpp
    grep '^#include "fastv.hpp"' "$file" | sed 's|"|<fastv/|; s|"|>|' >>beside_$name.cpp
    budget=$(($(lines beside_$name.cpp) + 1000))
  fi
  echo "fastv/$name.hpp: $count preprocessed lines${budget:+ of $budget}"
  [ -z "$budget" ] || [ "$count" -le "$budget" ] || fail "fastv/$name.hpp is over its budget of $budget lines"
}

# May this machine run what `flags` build for? (AVX-512 in the cloud comes and goes.)
runs_here() { grep -qw "$1" /proc/cpuinfo 2>/dev/null; }

odr() {
  lto="" clang=$($CXX --version | grep -c clang) || :
  [ "$clang" != 0 ] || lto="-flto=auto -Wodr -Werror"
  main=$root/tests/headers/self_check_main.cpp check=$root/tests/headers/self_check.cpp
  $CXX -std=c++20 -O0 $lto -I"$include" -DFASTV_CHECK=check_b -c "$check" -o b.o
  $CXX -std=c++20 -O0 -I"$include" -DFASTV_PART=2 -c "$root/tests/headers/odr_parts.cpp" -o part_b.o
  $CXX -std=c++17 -DFASTV_TWO $lto -c "$main" -o main.o
  for machine in avx avx2 avx512f; do
    flag=-m$machine
    echo | $CXX $flag -fsyntax-only -x c++ - 2>/dev/null || { echo "no $flag here"; continue; }
    $CXX -std=c++17 -O2 -DNDEBUG $flag $lto -I"$include" -DFASTV_CHECK=check_a -c "$check" -o a_$machine.o
    $CXX -std=c++17 -O3 $flag -I"$include" -DFASTV_PART=1 -c "$root/tests/headers/odr_parts.cpp" -o part_$machine.o
    for order in "main.o a_$machine.o b.o" "main.o b.o a_$machine.o" "part_$machine.o part_b.o" "part_b.o part_$machine.o"; do
      $CXX $lto $order -o odr_$machine
      if ! runs_here $machine; then
        echo "$order linked; NOT RUN: this machine has no $machine"
        continue
      fi
      echo "$order"
      ./odr_$machine || fail "one program of $order gives wrong answers"
    done
  done
}

runs() {
  name=$1
  shift
  $CXX -std=c++17 "$@" $warnings -I"$include" "$root/tests/headers/self_check.cpp" \
    "$root/tests/headers/self_check_main.cpp" -o "self_$name"
  $RUNNER ./self_$name
  $CXX -std=c++17 "$@" $warnings -I"$include" "$root/examples/minimal.cpp" -o "minimal_$name"
  $RUNNER ./minimal_$name >minimal_$name.txt
  # The same lines as README.md shows; readme_tests.cmake compares those with a default build.
  grep -q "layers 0-1 ran on 631 tokens, layers 2-31 run on 343" minimal_$name.txt || fail "minimal said otherwise"
}

refuses() {
  source=$root/tests/headers/must_not_compile.cpp
  sentence=$(sed -n "s/^#elif FASTV_CASE == $1  *\/\/ says: //p" "$source")
  [ -n "$sentence" ] || fail "must_not_compile.cpp has no case $1"
  compiles -std=c++17 -DFASTV_CASE="$1" "$source" || fail "the good branch of case $1 does not build"
  if compiles -std=c++17 -DFASTV_CASE="$1" -DFASTV_BAD "$source" 2>bad_$1.txt; then fail "the bad branch of case $1 builds"; fi
  grep -E 'error:' bad_$1.txt | grep -F "$sentence" >/dev/null ||
    { cat bad_$1.txt; fail "case $1: no error says \"$sentence\""; }
  echo "case $1 says: $sentence"
}

all() {
  for file in "$include"/fastv/*.hpp; do
    "$self" header "$(basename "$file" .hpp)" || [ $? = 77 ]
  done
  "$self" odr
  "$self" runs plain -O2 -fno-exceptions -fno-rtti
  "$self" runs fast_math -O3 -ffast-math
  for case in 1 2 3 4 5 6 7 8 9; do "$self" refuses $case; done
}

step=$1
shift
$step "$@"
