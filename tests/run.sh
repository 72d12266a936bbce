#!/bin/sh
# Installs what is missing, builds, runs the tests, and ends with a summary. Run it again at will.
#   sh tests/run.sh        the library, the authors' tensors and the reference decoder: 5 minutes of one core
#   sh tests/run.sh all    all but what other compilers, sanitizers and engines add (.ci/run): 40 minutes of one core
set -eu
cd "$(dirname "$0")/.."
. cmake/packages.sh

case ${1:-default} in
  default) target=default_tests chosen="-L default" ;;
  all) target=all chosen="" ;;
  *) echo "tests/run.sh: '$1' is no set of tests: say nothing, or all" >&2; exit 2 ;;
esac

need g++ cmake make pkg-config libeigen3-dev nlohmann-json3-dev libgtest-dev libstb-dev libcairo2-dev fonts-dejavu-core libopenmpi-dev openmpi-bin doxygen python3
configure_and_build build/tests $target -DFASTV_BUILD_BENCHMARKS=OFF ${FASTV_CMAKE_OPTIONS:-}

if ctest --test-dir build/tests --output-on-failure -j "$(nproc)" $chosen ${CTEST_OPTIONS:-}; then
  echo "All tests passed."
  if [ $target = all ]; then
    sed -n 's/^-- \(.* was not found: .*left out\)/\1/p' build/tests/build.log
  else
    echo "Headers, packages, docs, examples and fuzzers' findings: sh tests/run.sh all"
  fi
else
  echo "Some tests failed; the lines above say which." >&2
  exit 1
fi
