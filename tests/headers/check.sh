#!/bin/sh
# One check of the headers as a user's compiler sees them; ctest runs each (label `headers`).
#   check.sh header NAME          alone, twice, without a warning, in ASCII, within its budget, leaking no macro
#   check.sh odr                  two translation units of one program, built as differently as may be
#   check.sh runs NAME FLAG...    the self-check and examples/minimal.cpp, built with FLAGs, say what they should
#   check.sh refuses CASE         a case of must_not_compile.cpp: its good branch builds, its bad one says what to do
# CXX: the compiler. WORK: a folder for what is built. ENGINES: -I flags of engines that are not on the default path.
# Ends with 77 where the engine of an adaptor is not installed: skipped, which is not passed.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
: "${CXX:=c++}" "${WORK:=$root/build/headers}" "${ENGINES:=}"
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
lines() { $CXX -std=c++17 $system -I"$include" -E -x c++ "$1" | wc -l; }

# The standard's and the engine's headers that NAME includes, itself or through fastv's.
foreign_includes() {
  printf '#include <fastv/%s.hpp>\n' "$1" >deps_$1.cpp
  $CXX -std=c++17 $system -I"$include" -MM deps_$1.cpp | tr ' \\' '\n\n' | grep "^$include/fastv/" | xargs cat |
    grep -h '^#include <' | grep -v '<fastv/' | sort -u
}

header() {
  name=$1 file=$include/fastv/$1.hpp
  engine=$(sed -n 's/^#include <\([^>]*[/.][^>]*\)>.*/\1/p' "$file" | grep -v '^fastv/' | head -n 1)
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

  foreign_includes "$name" >foreign_$name.hpp
  for part in foreign_$name.hpp twice_$name.cpp; do
    $CXX -std=c++17 $system -I"$include" -dM -E -x c++ $part | sort >macros_$part
  done
  diff macros_foreign_$name.hpp macros_twice_$name.cpp | grep '^[<>]' | grep -v '^> #define FASTV_' >leaks_$name ||
    [ ! -s leaks_$name ] || :
  if [ -s leaks_$name ]; then cat leaks_$name; fail "fastv/$name.hpp defines (>) or takes away (<) these macros"; fi

  count=$(lines twice_$name.cpp)
  case $name in
    view) budget=3500 ;;
    fastv) budget=20000 ;;
    *) budget="" ;;
  esac
  if [ -n "$engine" ]; then
    echo "#include <$engine>" >engine_$name.cpp
    budget=$(($(lines engine_$name.cpp) + 1000 + $([ "$name" = eigen ] && echo 0 || echo 0)))
    # What the core costs besides: an engine's header that is C (ggml.h) brings none of it along.
    case $engine in *.h) case $engine in */*) ;; *) budget=$((budget + $(echo '#include <fastv/fastv.hpp>' >core.cpp; lines core.cpp))) ;; esac ;; esac
  fi
  echo "fastv/$name.hpp: $count preprocessed lines${budget:+ of $budget}"
  [ -z "$budget" ] || [ "$count" -le "$budget" ] || fail "fastv/$name.hpp is over its budget of $budget lines"
}

