#!/usr/bin/env bash
# Runs Ray's own RDT tests, from a checkout of Ray 2.60.0, against the wheel in .venv:
# ci/ray_tests.sh CHECKOUT [PYTEST ARGS]. ci/ray_tests.txt lists the excluded tests and the reasons.
set -euo pipefail

if [[ $# -eq 0 || ! -d $1/python/ray/tests/rdt ]]; then
  echo "usage: ci/ray_tests.sh CHECKOUT [PYTEST ARGS], where CHECKOUT contains Ray's python/ray/tests/rdt" >&2
  exit 2
fi
checkout=$(realpath "$1")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./build.sh venv >/dev/null

# Beside Ray's sources, the tests would import those instead of the wheel.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp "$checkout"/python/ray/tests/conftest.py "$folder"
cp -r "$checkout"/python/ray/tests/rdt "$folder"
find "$folder" -name __init__.py -delete

cd "$folder"
PYTHONPATH=$OLDPWD "$OLDPWD/.venv/bin/python" -m pytest -c /dev/null --rootdir "$folder" -p ci.ray_tests "$@" rdt
