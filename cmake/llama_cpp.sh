#!/bin/sh
# Gets llama.cpp and builds it, for the examples and tests that need it; prints the folder it was installed to.
#
#   sh cmake/llama_cpp.sh [FOLDER]
#
# FOLDER (default: $FASTV_LLAMA_CPP, else ~/.cache/fastv/llama.cpp-v0.5.0) then holds src/ and prefix/; run again, it
# does nothing. The sources are those of the release v0.5.0, which the npm package below carries as a git bundle: needs
# npm and git. Configure with -DFASTV_LLAMA_CPP_DIR=FOLDER/prefix.
set -eu
package=node-llama-cpp version=3.22.1
sha256=a0d9dd80eacd2ab1cfe71aee57ac8a806487fd70b3d2a38fbec637752d9e5c5f
folder=${1:-${FASTV_LLAMA_CPP:-${XDG_CACHE_HOME:-$HOME/.cache}/fastv/llama.cpp-v0.5.0}}

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
if [ "$(cat "$folder/prefix/complete" 2>/dev/null)" != "with RPC and libllama-common" ]; then
  log=$folder/build.log
  echo "Getting llama.cpp v0.5.0 ($package@$version) and building it in $folder: about 5 minutes on 2 cores" >&2
  fail() {
    tail -n 30 "$log" >&2
    echo "llama.cpp could not be built; the whole log is $log" >&2
    exit 1
  }
  if [ ! -d "$folder/src/.git" ]; then
    rm -rf "$folder/src" "$folder/src.part" "$folder/package"
    (cd "$folder" && npm pack --silent "$package@$version") >"$log" 2>&1 || fail
    echo "$sha256  $folder/$package-$version.tgz" | sha256sum -c - >"$log" 2>&1 || fail
    tar -xzf "$folder/$package-$version.tgz" -C "$folder" package/llama/gitRelease.bundle >"$log" 2>&1 || fail
    git -c advice.detachedHead=false clone --quiet "$folder/package/llama/gitRelease.bundle" "$folder/src.part" >"$log" 2>&1 || fail
    mv "$folder/src.part" "$folder/src"
    rm -rf "$folder/package" "$folder/$package-$version.tgz"
  fi
  generator=""
  command -v ninja >/dev/null && generator="-G Ninja"
  # Virtual machines may name AMX among their features and trap its instructions.
  flags=""
  ! grep -qw amx_tile /proc/cpuinfo 2>/dev/null || flags="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
  # shellcheck disable=SC2086
  cmake -S "$folder/src" -B "$folder/build" $generator -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" \
    -DCMAKE_INSTALL_PREFIX="$folder/prefix" -DCMAKE_INSTALL_LIBDIR=lib -DCMAKE_INSTALL_RPATH='$ORIGIN/../lib;$ORIGIN' -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \
    -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_MTMD=ON -DGGML_RPC=ON >"$log" 2>&1 || fail
  cmake --build "$folder/build" --target llama mtmd llama-mtmd-cli -j "$(nproc)" >"$log" 2>&1 || fail
  # The other tools are not built, so what is needed is put in place by hand: elsewhere first, so that whoever looks for the
  # prefix meanwhile finds all of it or nothing.
  part=$folder/prefix.part
  rm -rf "$part"
  {
    cmake --install "$folder/build/ggml" --prefix "$part" && cmake --install "$folder/build/src" --prefix "$part" &&
      mkdir -p "$part/bin" "$part/include" "$part/lib/cmake" &&
      cp "$folder/src/include/llama.h" "$folder/src/tools/mtmd/mtmd.h" "$folder/src/tools/mtmd/mtmd-helper.h" "$part/include/" &&
      mkdir -p "$part/include/llama-common/jinja" && cp "$folder/src/include/llama-cpp.h" "$folder"/src/common/*.h "$part/include/llama-common/" &&
      cp "$folder"/src/common/jinja/*.h "$part/include/llama-common/jinja/" &&
      cp -P "$folder"/build/bin/lib*.so* "$part/lib/" &&
      cp "$folder/build/bin/llama-mtmd-cli" "$part/bin/" &&
      echo "with RPC and libllama-common" >"$part/complete" && rm -rf "$folder/prefix" && mv "$part" "$folder/prefix"
  } >"$log" 2>&1 || fail
  rm -rf "$folder/build"
fi
echo "$folder"
