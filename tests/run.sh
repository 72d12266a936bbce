#!/bin/sh
# Installs what is missing, builds, runs the tests, and ends with a summary. Run it again at will.
set -eu
cd "$(dirname "$0")/.."
. cmake/packages.sh

need g++ cmake make pkg-config libeigen3-dev nlohmann-json3-dev libgtest-dev libstb-dev libcairo2-dev fonts-dejavu-core libopenmpi-dev openmpi-bin doxygen python3
configure_and_build build/tests all -DFASTV_BUILD_BENCHMARKS=OFF ${FASTV_CMAKE_OPTIONS:-}

if ctest --test-dir build/tests --output-on-failure -j "$(nproc)" ${CTEST_OPTIONS:-}; then
  echo "All tests passed."
  sed -n 's/^-- \(.* was not found: .*left out\)/\1/p' build/tests/build.log
else
  echo "Some tests failed; the lines above say which." >&2
  exit 1
fi
