#!/usr/bin/env bash
# Random work over all paths with random faults, for so many minutes (default 10); see ci/soak/__main__.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(./build.sh venv | tail -n 1)
PYTHONPATH=. exec "$python" -m ci.soak "$@"
