#!/bin/sh
# One check of the headers as a user's compiler sees them; ctest runs each (label `headers`).
#   check.sh header NAME          alone, twice, without a warning, in ASCII, within its budget, leaking no macro, and behind
#                                 macros of others that hit common names. NAME: fastv, eigen, detail/walk, ...
#   check.sh odr                  two translation units of one program, built as differently as may be
#   check.sh runs NAME FLAG...    the self-check and examples/minimal.cpp, built with FLAGs, say what they should
#   check.sh refuses CASE         a case of must_not_compile.cpp: its good branch builds, its bad one says what to do
#   check.sh c_face               fastv_c.h the same, as C99 and with its functions as C++
#   check.sh macros               behind the headers that define such macros, where they are installed
#   check.sh all                  all of these, for compilers that are not the build's
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
  printf '#include <fastv/%s.hpp>\n' "$1" >deps.$id.cpp
  $CXX -std=c++17 $system -I"$include" -MM deps.$id.cpp | tr ' \\' '\n\n' | grep "^$include/fastv/" | xargs cat |
    grep -h '^#include <' | grep -v '<fastv/' | sort -u
}
# Every header of ours, by name; begin.hpp and end.hpp are parts of the others.
names() { (cd "$include/fastv" && ls *.hpp detail/*.hpp) | grep -vE 'detail/(begin|end)' | sed 's/\.hpp$//'; }

header() {
  name=$1 file=$include/fastv/$1.hpp id=$(echo "$1" | tr / .)
  [ -f "$file" ] || fail "there is no $file"
  # The engine's header, included here or by a header of ours that is.
  engine=$(sed -n 's|^#include "\(.*\)"|'"$(dirname "$file")"'/\1|p' "$file" | xargs cat "$file" |
    sed -n 's/^#include <\([^>]*[/.][^>]*\)>.*/\1/p' | head -n 1)
  if [ -n "$engine" ] && ! echo "#include <$engine>" | compiles -std=c++17 -x c++ - 2>/dev/null; then
    echo "fastv/$name.hpp is NOT TESTED HERE: install what has <$engine>, or name its folder in FASTV_ENGINE_INCLUDES"
    exit 77
  fi
  if LC_ALL=C grep -n '[^ -~	]' "$file"; then fail "fastv/$name.hpp has characters that are not ASCII"; fi

  printf '#include <fastv/%s.hpp>\n#include <fastv/%s.hpp>\n' "$name" "$name" >twice.$id.cpp
  # An engine's own headers may need no newer standard than 17, and may not build under it.
  for standard in 17 20 23; do
    [ $standard = 23 ] && ! echo | compiles -std=c++23 -x c++ - 2>/dev/null && standard=2b
    if [ -n "$engine" ] && ! echo "#include <$engine>" | compiles -std=c++$standard -x c++ - 2>/dev/null; then
      echo "<$engine> itself does not build as C++$standard"
      continue
    fi
    compiles -std=c++$standard $warnings twice.$id.cpp || fail "fastv/$name.hpp does not stand alone as C++$standard"
  done

  # The same behind hostile macros; those of an engine are its own affair, so its headers come first.
  foreign_includes "$name" >foreign.$id.cpp
  if [ -n "$engine" ]; then cat foreign.$id.cpp; fi >hostile.$id.cpp
  echo "#include \"$root/tests/headers/hostile_macros.hpp\"" >>hostile.$id.cpp
  cat hostile.$id.cpp twice.$id.cpp >behind.$id.cpp
  compiles -std=c++17 behind.$id.cpp || fail "fastv/$name.hpp does not build behind macros of others"

  cat foreign.$id.cpp hostile.$id.cpp >before.$id.cpp
  cat before.$id.cpp twice.$id.cpp >after.$id.cpp
  for part in before after; do
    $CXX -std=c++17 $system -I"$include" -dM -E -x c++ $part.$id.cpp | sort >macros_$part.$id
  done
  diff macros_before.$id macros_after.$id | grep '^[<>]' | grep -v '^> #define FASTV_VERSION_' >leaks.$id || :
  if [ -s leaks.$id ]; then
    cat leaks.$id
    fail "fastv/$name.hpp defines (>) or takes away (<) these macros"
  fi

  # Lines of ours, above what it includes of others: of the standard library six headers, of an engine its narrowest. The
  # core counts as another's for adaptors that include all of it.
  budget=6500
  case $name in version | element | view) budget=500 ;; cuda_* | detail/cuda_*) budget=9000 ;; esac
  [ -z "$engine" ] || budget=1500
  [ "$name" != detail/cuda_torch ] || budget=11000  # the kernels and the core, for nvcc and tests alone
  if [ -n "$engine" ]; then
    echo "#include <$engine>" >beside.$id.cpp
    grep '^#include "fastv.hpp"' "$file" | sed 's|"|<fastv/|; s|"|>|' >>beside.$id.cpp
  else
    strangers=$(grep -vxE '#include <(cstddef|cstdint|cstdio|cstring|new|utility)>' foreign.$id.cpp || :)
    [ -z "$strangers" ] || fail "fastv/$name.hpp includes more of the standard library than the core may: $strangers"
    cp foreign.$id.cpp beside.$id.cpp
  fi
  count=$(lines twice.$id.cpp)
  own=$((count - $(lines beside.$id.cpp)))
  echo "fastv/$name.hpp: $count preprocessed lines, $own of $budget of them ours"
  [ "$own" -le "$budget" ] || fail "fastv/$name.hpp is over its budget of $budget lines"
}

c_face() {
  c=$(echo "$CXX" | sed 's/clang++/clang/; s/g++/gcc/; s/c++/cc/')
  hostile="#include \"$root/tests/headers/hostile_macros.hpp\""
  printf '#include <stddef.h>\n#include <stdint.h>\n%s\n' "$hostile" >before.c
  printf '#include <fastv/fastv_c.h>\n#include <fastv/fastv_c.h>\n' >twice.c
  cat before.c twice.c >after.c
  for file in twice.c after.c; do
    $c -std=c99 -Wall -Wextra -Wconversion -Wshadow -Wundef -Wstrict-prototypes -pedantic-errors -Werror -I"$include" \
      -fsyntax-only $file || fail "fastv/fastv_c.h does not stand alone as C99"
  done
  for part in before after; do $c -std=c99 -I"$include" -dM -E $part.c | sort >macros_$part; done
  diff macros_before macros_after | grep '^[<>]' | grep -vE '^> #define FASTV_(C_H|C_API|NO_SLOT|BY_RATIO) ' >leaks || :
  if [ -s leaks ]; then
    cat leaks
    fail "fastv/fastv_c.h defines (>) or takes away (<) these macros"
  fi
  printf '#define FASTV_C_IMPLEMENTATION\n#include <fastv/fastv_c.h>\n' >functions.cpp
  compiles -std=c++17 $warnings functions.cpp || fail "the functions of fastv/fastv_c.h do not build without a warning"
  printf '%s\n' "$hostile" >behind.cpp
  cat functions.cpp >>behind.cpp
  compiles -std=c++17 behind.cpp || fail "the functions of fastv/fastv_c.h do not build behind macros of others"
}

# What a program may well include first.
macros() {
  for other in X11/Xlib.h X11/Xutil.h X11/Xos.h complex.h term.h curses.h sys/sysmacros.h windows.h AssertMacros.h; do
    printf '#include <%s>\n' $other >others.cpp
    compiles -std=gnu++17 others.cpp 2>/dev/null || { echo "<$other> is not here"; continue; }
    printf '#include <fastv/fastv.hpp>\n' >>others.cpp
    compiles -std=gnu++17 others.cpp || fail "fastv/fastv.hpp does not build behind <$other>"
    echo "builds behind <$other>"
  done
}

# May this machine run what `flags` build for? (AVX-512 in the cloud comes and goes.)
runs_here() { grep -qw "$1" /proc/cpuinfo 2>/dev/null; }

# What the linker may take from either of two objects: our functions that are in both by the same name. Nothing of it may
# depend on the machine that an object is built for. The default constructors of plain data cannot be told apart.
shared_names() {
  for object in "$1" "$2"; do
    nm -C $object | sed -n 's/^[0-9a-f]* [uVWw] //p' | grep -E '^(.* )?fastv::' | grep -v 'std::' | sort -u >$object.names
  done
  comm -12 $1.names $2.names | grep -v '^fastv::\([A-Za-z]*\)::\1()$' || :
}

odr() {
  main=$root/tests/headers/self_check_main.cpp check=$root/tests/headers/self_check.cpp
  parts=$root/tests/headers/odr_parts.cpp
  $CXX -std=c++20 -O0 -I"$include" -DFASTV_CHECK=check_b -c "$check" -o b.o
  $CXX -std=c++20 -O0 -I"$include" -DFASTV_PART=2 -c "$parts" -o part_b.o
  $CXX -std=c++17 -DFASTV_TWO -c "$main" -o main.o
  for machine in avx avx2 avx512f; do
    flag=-m$machine
    echo | $CXX $flag -fsyntax-only -x c++ - 2>/dev/null || { echo "no $flag here"; continue; }
    $CXX -std=c++17 -O0 $flag -I"$include" -DFASTV_CHECK=check_a -c "$check" -o plain.o
    shared=$(shared_names plain.o b.o)
    [ -z "$shared" ] || { echo "$shared"; fail "these functions are shared by objects built for different machines"; }
    $CXX -std=c++17 -O1 -DNDEBUG $flag -I"$include" -DFASTV_CHECK=check_a -c "$check" -o a_$machine.o
    $CXX -std=c++17 -O3 $flag -I"$include" -DFASTV_PART=1 -c "$parts" -o part_$machine.o
    for order in "main.o a_$machine.o b.o" "main.o b.o a_$machine.o" "part_$machine.o part_b.o" "part_b.o part_$machine.o"; do
      together "$order" || fail "one program of $order gives wrong answers"
    done
  done
  # gcc compares the types of both objects where it links with all the code at hand.
  [ "$($CXX --version | grep -c clang)" = 0 ] || return 0
  $CXX -std=c++20 -O0 -flto -I"$include" -DFASTV_CHECK=check_b -c "$check" -o lto_b.o
  $CXX -std=c++17 -O1 -flto -mavx2 -I"$include" -DFASTV_CHECK=check_a -c "$check" -o lto_a.o || { echo "no -mavx2 here"; return 0; }
  machine=avx2
  together "main.o lto_a.o lto_b.o -flto=auto -Wodr -Werror" || fail "linked with -flto, it gives wrong answers"
}
# together OBJECTS: one program of them, run where this machine can.
together() {
  $CXX $1 -o odr_$machine
  runs_here $machine || { echo "$1 linked; NOT RUN: this machine has no $machine"; return 0; }
  echo "$1"
  ./odr_$machine
}

# What -o NAME made: compilers for Windows end it in .exe.
built() { [ -f "$1" ] && echo "./$1" || echo "./$1.exe"; }

runs() {
  name=$1
  shift
  $CXX -std=c++17 "$@" $warnings -I"$include" "$root/tests/headers/self_check.cpp" \
    "$root/tests/headers/self_check_main.cpp" -o "self_$name"
  $RUNNER "$(built self_$name)"
  $CXX -std=c++17 "$@" $warnings -I"$include" "$root/examples/minimal.cpp" -o "minimal_$name"
  $RUNNER "$(built minimal_$name)" >minimal_$name.txt
  # The same lines as README.md shows; readme_tests.cmake compares those with a default build.
  grep -q "layers 0-1 ran on 631 tokens, the others run on 343" minimal_$name.txt || fail "minimal said otherwise"
}

cases() { sed -n 's/^#elif FASTV_CASE == \([0-9]*\) .*/\1/p' "$root/tests/headers/must_not_compile.cpp"; }

refuses() {
  source=$root/tests/headers/must_not_compile.cpp
  sentence=$(sed -n "s/^#elif FASTV_CASE == $1  *\/\/ says: //p" "$source")
  [ -n "$sentence" ] || fail "must_not_compile.cpp has no case $1"
  case $1 in
    1??) engine=ATen/core/Tensor.h ;;
    2??) engine=ggml.h ;;
    *) engine="" ;;
  esac
  if [ -n "$engine" ] && ! echo "#include <$engine>" | compiles -std=c++17 -x c++ - 2>/dev/null; then
    echo "case $1 is NOT TESTED HERE: install what has <$engine>, or name its folder in FASTV_ENGINE_INCLUDES"
    exit 77
  fi
  compiles -std=c++17 $warnings -DFASTV_CASE="$1" "$source" || fail "the good branch of case $1 does not build"
  if compiles -std=c++17 -DFASTV_CASE="$1" -DFASTV_BAD "$source" 2>bad_$1.txt; then fail "the bad branch of case $1 builds"; fi
  # One error, soon: what comes first is what is read.
  at=$(grep -n 'error:' bad_$1.txt | grep -F "$sentence" | head -n 1 | cut -d : -f 1)
  [ -n "$at" ] || { cat bad_$1.txt; fail "case $1: no error says \"$sentence\""; }
  [ "$(grep -c 'error:' bad_$1.txt)" = 1 ] || { cat bad_$1.txt; fail "case $1: more than one error"; }
  [ "$at" -le 8 ] || { cat bad_$1.txt; fail "case $1: $at lines up to \"$sentence\""; }
  echo "case $1 says, in line $at: $sentence"
}

all() {
  for name in $(names); do
    "$self" header "$name" || [ $? = 77 ]
  done
  "$self" c_face
  "$self" macros
  "$self" odr
  "$self" runs plain -O2 -fno-exceptions -fno-rtti
  "$self" runs fast_math -O3 -ffast-math
  for case in $(cases); do "$self" refuses "$case" || [ $? = 77 ]; done
}

step=$1
shift
$step "$@"
