# Sourced by examples/demo.sh, tests/run.sh and .ci/run: installs missing Debian or Ubuntu packages.

# need PACKAGE... : says which are missing, installs them with apt-get, asks nothing. Scripts that run side by side wait
# for one another here.
need() {
  exec 9>"${TMPDIR:-/tmp}/fastv_packages.lock"
  ! command -v flock >/dev/null || flock 9
  need_locked "$@" 9>&-
  exec 9>&-
}
need_locked() {
  missing=""
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing="$missing $package"
  done
  [ -n "$missing" ] || return 0
  if ! command -v apt-get >/dev/null; then
    echo "This machine lacks$missing and has no apt-get: install their equivalents and run this again." >&2
    exit 1
  fi
  as_root=""
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "Run as root, or install first:$missing" >&2; exit 1; }
    as_root=sudo
  fi
  echo "Installing$missing"
  log=$(mktemp)
  if ! { $as_root apt-get update && $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "apt-get could not install$missing (whole log: $log)" >&2
    exit 1
  fi
  rm -f "$log"
}

# configure_and_build FOLDER TARGET [CMAKE OPTION...] : quiet unless it fails; one line a minute of its progress.
configure_and_build() {
  folder=$1 target=$2
  shift 2
  mkdir -p "$folder"
  log=$folder/build.log
  if ! cmake -S . -B "$folder" "$@" >"$log" 2>&1; then
    cat "$log" >&2
    exit 1
  fi
  if [ -t 1 ]; then
    cmake --build "$folder" --target "$target" -j "$(nproc)" 2>&1 | tee -a "$log" | grep --line-buffered -o '^\[ *[0-9]*%\]' |
      while read -r percent rest; do printf '\rBuilding %s %s ' "$percent" "$rest"; done
    echo
  else
    echo "Building in $folder"
    cmake --build "$folder" --target "$target" -j "$(nproc)" >>"$log" 2>&1 || true
  fi
  # The exit status above may be the pipe's: build again, which does nothing where all is built.
  if ! cmake --build "$folder" --target "$target" >>"$log" 2>&1; then
    grep -B 2 -A 12 -E 'error|Error' "$log" | tail -n 60 >&2
    echo "The build failed; the whole log is $log" >&2
    exit 1
  fi
}
