#!/usr/bin/env bash
# Random work over all paths with random faults, for so many minutes (default 10); see ci/soak/__main__.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Memory that a process frees goes back to the system, so that what stays is a leak.
export MALLOC_MMAP_THRESHOLD_=1000000

python=$(./build.sh venv | tail -n 1)
PYTHONPATH=. exec "$python" -m ci.soak "$@"
