#!/usr/bin/env bash
# Builds, tests and measures the wheel; `./build.sh help` lists the commands.
# This script finds Python and creates the build's venv. The steps are in ci/build/.
set -euo pipefail

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-python3}

fail() {
  echo "build.sh: $*" >&2
  exit 1
}

command -v "$python" >/dev/null || fail "'$python' not found: install Python 3.10 to 3.14, or select one, for example PYTHON=python3.12 ./build.sh"
tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2] if sys.implementation.name == "cpython" else sys.implementation.name)')
case $tag in
  cp310 | cp311 | cp312 | cp313 | cp314) ;;
  *) fail "'$python' is $tag, but Ray's wheel exists only for CPython 3.10 to 3.14: select another, for example PYTHON=python3.12 ./build.sh" ;;
esac

tools=build/tools-$tag
wanted=$(cat ci/requirements/build.txt)
if [[ ! -x $tools/bin/python || "$(cat "$tools/installed.txt" 2>/dev/null)" != "$wanted" ]]; then
  echo "build.sh: creating the build's venv, $tools" >&2
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "'$python' cannot create a venv: install its venv package (on Debian: apt-get install python3-venv)"
  rm -rf "$tools"
  "$python" -m venv "$tools"
  "$tools/bin/python" -m pip install -qq --requirement ci/requirements/build.txt ||
    fail "pip could not install ci/requirements/build.txt: it needs a package index and about 100 MB of disk"
  echo "$wanted" >"$tools/installed.txt"
fi

exec "$tools/bin/python" -m ci.build --from "$here" "$@"
