#!/bin/sh
# demo.sh [PICTURE] [QUESTION] [OPTION...] : FastV on a picture and a question about it, with and without pruning.
# Installs what is missing and builds first. demo.sh --help lists the options and says what the model was taught.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
start=$PWD
cd "$here"
. cmake/packages.sh

need g++ cmake make pkg-config libeigen3-dev nlohmann-json3-dev libstb-dev libcairo2-dev fonts-dejavu-core
configure_and_build build/demo scenes_demo -DFASTV_BUILD_TESTS=OFF -DFASTV_BUILD_BENCHMARKS=OFF
cd "$start"  # file names are the user's
exec "$here/build/demo/examples/scenes_demo" "$@"
