#!/bin/sh
# A user's project, made and built each way fastv can be added; ctest runs each (label `consume`).
#   consume.sh find_package | component NAME | add_subdirectory | fetch_content | pkg_config | single_file | single_cuda |
#              amalgamate | vcpkg | conan | ggml_source
# CXX, WORK as in ../headers/check.sh. Ends with 77 where what it needs is not installed: skipped, which is not passed.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/tests/consume
: "${CXX:=c++}" "${WORK:=$root/build/consume}"
export CXX
way=$1
# Folders with spaces in their names, as on many a user's disk.
work="$WORK/the $way${2:+ $2}"
rm -rf "$work"
mkdir -p "$work"
version=$(sed -n 's/^#define FASTV_VERSION_[A-Z]* //p' "$root/include/fastv/version.hpp" | paste -sd . -)

fail() { echo "$*" >&2; exit 1; }
skip() { echo "$way${2:+ $2} is NOT TESTED HERE: $1"; exit 77; }
quiet() { "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; fail "failed: $*"; }; }
# The package into "$work/moved": installed elsewhere first, then moved.
install_package() {
  quiet cmake -S "$root" -B "$work/package" -DFASTV_BUILD_TESTS=OFF -DFASTV_BUILD_EXAMPLES=OFF -DFASTV_BUILD_BENCHMARKS=OFF
  quiet cmake --install "$work/package" --prefix "$work/prefix"
  mv "$work/prefix" "$work/moved"
  rm -rf "$work/package"
  ! grep -rnF "$work" "$work/moved" || fail "the package knows where it was installed"
}
# configure PROJECT OPTION... ; then build and run its program.
configure() { project=$1; shift; cmake -S "$here/$project" -B "$work/build" -DPROGRAM="$root/examples/minimal.cpp" "$@"; }
build_and_run() {
  quiet cmake --build "$work/build" -j 2
  "$work/build/consume"
}
# refused SENTENCE OPTION... : find_package must fail and say so.
refused() {
  sentence=$1
  shift
  rm -rf "$work/build"
  if configure find_package -DCMAKE_PREFIX_PATH="$work/moved" "$@" >"$work/log" 2>&1; then fail "accepted: $*"; fi
  tr -s ' \n' '  ' <"$work/log" | grep -F "$sentence" >/dev/null || { cat "$work/log"; fail "$* is refused, but not by: $sentence"; }
  echo "refused, as it should be: $*"
}

find_package() {
  install_package
  major=${version%%.*} rest=${version#*.}
  minor=${rest%.*} patch=${version##*.}
  for wanted in "" $major.$minor $version; do
    rm -rf "$work/build"
    quiet configure find_package -DCMAKE_PREFIX_PATH="$work/moved" -DWANTED="$wanted"
    build_and_run
  done
  refused "compatible with requested version" -DWANTED=$major.$((minor + 1))
  refused "compatible with requested version" -DWANTED=$((major + 1)).0
  refused "compatible with requested version" -DWANTED=$major.$minor.$((patch + 1))
  # Before 1.0 minor versions may break: one that asks for an older one must not get this.
  [ "$minor" = 0 ] || refused "compatible with requested version" -DWANTED=$major.$((minor - 1))
  refused 'fastv has no component "jax": it has cuda, eigen, ggml, torch.' -DCOMPONENTS=jax
  # Engines made invisible: the sentence names what to install.
  refused "fastv::cuda needs a CUDA toolkit: install one" -DCOMPONENTS=cuda -DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON
  refused "fastv::eigen needs Eigen: install it" -DCOMPONENTS=eigen -DCMAKE_DISABLE_FIND_PACKAGE_Eigen3=ON
  refused "fastv::ggml needs ggml: install it" -DCOMPONENTS=ggml -DCMAKE_DISABLE_FIND_PACKAGE_ggml=ON
  refused "fastv::torch needs LibTorch: install it" -DCOMPONENTS=torch -DCMAKE_DISABLE_FIND_PACKAGE_Torch=ON
  rm -rf "$work/build"
  quiet configure find_package -DCMAKE_PREFIX_PATH="$work/moved" -DOPTIONAL=ggml -DCMAKE_DISABLE_FIND_PACKAGE_ggml=ON
}

component() {
  program=$here/$1.cpp
  if [ "$1" = cuda ]; then
    program=$here/cuda.cu
    command -v nvcc >/dev/null || skip "install nvcc (CUDA 11.8 or newer)" cuda
  fi
  install_package
  for prefix in "$HOME"/.cache/fastv/*/prefix; do engines=$prefix; done  # where cmake/llama_cpp.sh builds ggml
  if ! configure find_package -DCMAKE_PREFIX_PATH="$work/moved;${engines:-}" -DCOMPONENTS="$1" -DPROGRAM="$program" \
    >"$work/log" 2>&1; then
    sentence=$(tr -s ' \n' '  ' <"$work/log" | grep -o "fastv::$1 needs [^.]*\.") || { cat "$work/log"; fail "no sentence"; }
    skip "$sentence" "$1"
  fi
  build_and_run
}

add_subdirectory() {
  quiet configure add_subdirectory -DFASTV_CHECKOUT="$root"
  build_and_run
  if [ -f /usr/include/eigen3/Eigen/Core ]; then
    quiet configure add_subdirectory -DFASTV_CHECKOUT="$root" -DFASTV_COMPONENTS=eigen
    build_and_run
  fi
  if command -v nvcc >/dev/null; then
    rm -rf "$work/build"
    quiet configure add_subdirectory -DFASTV_CHECKOUT="$root" -DFASTV_COMPONENTS=cuda
    build_and_run
    "$work/build/with_cuda"
  fi
}
ggml_source() {
  for src in "$HOME"/.cache/fastv/*/src; do ggml=$src/ggml; done  # where cmake/llama_cpp.sh keeps it
  [ -f "${ggml:-}/CMakeLists.txt" ] || skip "ggml's sources are not here (sh cmake/llama_cpp.sh)"
  # A C compiler of the same make, since ggml asks only one of the two what it takes.
  CC=$(echo "$CXX" | sed 's/clang++/clang/; s/g++/gcc/; s/c++/cc/')
  export CC
  quiet configure ggml_source -DFASTV_CHECKOUT="$root" -DGGML_CHECKOUT="$ggml" -DPROGRAM="$here/ggml.cpp"
  build_and_run
}
fetch_content() {
  quiet configure fetch_content -DFASTV_CHECKOUT="$root"
  build_and_run
}
pkg_config() {
  command -v pkg-config >/dev/null || skip "install pkg-config"
  install_package
  export PKG_CONFIG_PATH="$work/moved/share/pkgconfig"
  [ "$(pkg-config --modversion fastv)" = "$version" ] || fail "fastv.pc states another version"
  ! pkg-config --atleast-version="${version%%.*}.99" fastv || fail "fastv.pc claims too much"
  eval "$CXX -std=c++17 $(pkg-config --cflags fastv) '$root/examples/minimal.cpp' -o '$work/consume'"
  "$work/consume"
}
# The one file with every choice of adaptors: each header once, in an order that builds, and in any number of translation
# units beside the headers themselves.
amalgamate() {
  flags="-std=c++17 -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wundef -Werror"
  engines=$(pkg-config --cflags eigen3 2>/dev/null | sed 's/-I/-isystem /g')
  for prefix in "$HOME"/.cache/fastv/*/prefix; do engines="$engines -isystem $prefix/include"; done
  one=$work/one/fastv.hpp
  mkdir -p "$work/one"
  printf '#include "fastv.hpp"\n#include "fastv.hpp"\n' >"$work/one/twice.cpp"
  for adaptors in "" eigen ggml torch torch_device "eigen ggml" "ggml eigen" "torch torch_device" "torch_device torch" \
    "eigen torch" "ggml torch_device" "eigen ggml torch torch_device" "eigen eigen"; do
    quiet cmake -DADAPTORS="$adaptors" -DOUT="$one" -P "$root/cmake/amalgamate.cmake"
    ! grep -n '#include "' "$one" || fail "an #include of ours is left"
    # Whatever the headers themselves would include, and nothing else of ours.
    for header in fastv $adaptors; do echo "#include <fastv/$header.hpp>"; done >"$work/one/wanted.cpp"
    wanted=$($CXX -std=c++17 -I"$root/include" -MM -MG "$work/one/wanted.cpp" | tr ' \\' '\n\n' | grep -F "/include/fastv/" |
      sed 's|.*/include/fastv/||; s|detail/\.\./||g' | sort -u)
    for header in $(cd "$root/include/fastv" && ls *.hpp detail/*.hpp | grep -vE 'detail/(begin|end)'); do
      expected=$(echo "$wanted" | grep -cxF "$header" || :)
      # Of kernels a compiler other than nvcc knows nothing.
      case "$adaptors $header" in *torch_device*cuda_*) expected=1 ;; esac
      times=$(grep -cxF "$(head -n 1 "$root/include/fastv/$header")" "$one" || :)
      [ "$times" = "$expected" ] || fail "with ADAPTORS=\"$adaptors\" the file has $header $times times, not $expected"
    done
    case $adaptors in "" | eigen | "ggml eigen" | "eigen ggml torch torch_device") ;; *) continue ;; esac
    missing=""
    for engine in $(sed -n 's/^#include <\([^>]*[/.][^>]*\)>.*/\1/p' "$one" | grep -vE '^(c10/cuda|hip)/|^cuda_runtime'); do
      echo "#include <$engine>" | $CXX -std=c++17 $engines -fsyntax-only -x c++ - 2>/dev/null || missing="$missing <$engine>"
    done
    [ -z "$missing" ] || { echo "ADAPTORS=\"$adaptors\" is NOT BUILT HERE: no$missing"; continue; }
    $CXX $flags $engines -I"$work/one" -fsyntax-only "$work/one/twice.cpp" || fail "ADAPTORS=\"$adaptors\" does not build"
    echo "ADAPTORS=\"$adaptors\" builds"
  done

  # Two translation units with the one file, and one with the headers, in one program.
  quiet cmake -DOUT="$work/one/fastv.hpp" -P "$root/cmake/amalgamate.cmake"
  mkdir -p "$work/one/fastv"
  echo '#include "../fastv.hpp"' >"$work/one/fastv/fastv.hpp"
  check=$root/tests/headers/self_check.cpp
  $CXX $flags -I"$work/one" -DFASTV_CHECK=check_a -c "$check" -o "$work/one/a.o"
  $CXX $flags -I"$root/include" -DFASTV_CHECK=check_b -c "$check" -o "$work/one/b.o"
  $CXX $flags -I"$work/one" -include fastv.hpp -DFASTV_TWO "$root/tests/headers/self_check_main.cpp" "$work/one/a.o" \
    "$work/one/b.o" -o "$work/one/both"
  "$work/one/both"
  # Both in one translation unit are one too many, and that is said.
  printf '#include <fastv/fastv.hpp>\n#include "%s"\n' "$work/one/fastv.hpp" >"$work/one/both.cpp"
  ! $CXX $flags -I"$root/include" -fsyntax-only "$work/one/both.cpp" 2>"$work/log" || fail "both at once build"
  grep -F 'fastv is here already' "$work/log" >/dev/null || { cat "$work/log"; fail "both at once: no sentence"; }
}
# Unit tests on the one file. Without optimisation: it is the file that is tested here.
single_file() {
  mkdir -p "$work/one/fastv"
  quiet cmake -DADAPTORS=eigen -DOUT="$work/one/fastv.hpp" -P "$root/cmake/amalgamate.cmake"
  $CXX -std=c++17 -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Werror -I"$work/one" \
    $(pkg-config --cflags eigen3 | sed 's/-I/-isystem /g') "$here/eigen_single.cpp" -o "$work/eigen_single"
  "$work/eigen_single"
  mkdir -p "$work/one/fastv/detail"
  for header in $(cd "$root/include/fastv" && ls *.hpp detail/*.hpp); do  # what the tests include, led to the one file
    case $header in detail/*) up=../.. ;; *) up=.. ;; esac
    echo "#include \"$up/fastv.hpp\"" >"$work/one/fastv/$header"
  done
  cp "$root/include/fastv/fastv_c.h" "$work/one/fastv/"
  # Some of them: the others would compile the same file again for minutes.
  sources=""
  for test in apply pages pruner select slots counted_new; do
    source=$root/tests/$test.cpp
    [ -f "$source" ] || source=$root/tests/${test}_test.cpp
    sources="$sources${sources:+;}$source"
  done
  quiet configure single_file -DGENERATED="$work/one" -DTEST_SOURCES="$sources" -DCMAKE_CXX_FLAGS=-O0
  quiet cmake --build "$work/build" -j 2
  "$work/build/consume" --gtest_brief=1
}
# The kernels and all they need as one file: it builds by nvcc, twice in one translation unit, and links.
single_cuda() {
  command -v nvcc >/dev/null || skip "install nvcc (CUDA 11.8 or newer)"
  mkdir -p "$work/one/fastv"
  quiet cmake -DADAPTORS=cuda -DOUT="$work/one/fastv/cuda.cuh" -P "$root/cmake/amalgamate.cmake"
  ! grep -n '#include "' "$work/one/fastv/cuda.cuh" || fail "an #include of ours is left"
  { echo '#include <fastv/cuda.cuh>' && cat "$here/cuda.cu"; } >"$work/one/cuda.cu"
  quiet nvcc -std=c++17 -ccbin "$CXX" -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -I"$work/one" "$work/one/cuda.cu" \
    -o "$work/cuda"
  "$work/cuda"
}
# The port with stand-ins for vcpkg's functions that do their main work, and a consumer of what it installs.
vcpkg() {
  quiet cmake -DROOT="$root" -DWORK="$work" -P "$here/vcpkg_stand_in.cmake"
  quiet configure find_package -DCMAKE_PREFIX_PATH="$work/installed"
  build_and_run
}
# The recipe under stand-ins for conan's modules: it parses, and reads the version.
conan() {
  command -v python3 >/dev/null || skip "install python3"
  [ "$(python3 -B "$here/conan_stand_in.py" "$root/cmake/packaging/conan/conanfile.py" "$work/installed")" = "$version" ] ||
    fail "the recipe states another version"
  quiet configure find_package -DCMAKE_PREFIX_PATH="$work/installed"
  build_and_run
}

shift
$way "$@"
rm -rf "$work"
