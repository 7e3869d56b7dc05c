#!/usr/bin/env bash
# Run random work with random faults for the given minutes (default 10); see ci/soak/__main__.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Freed memory returns to the system, so that remaining memory is a leak.
export MALLOC_MMAP_THRESHOLD_=1000000

python=$(./build.sh venv | tail -n 1)
PYTHONPATH=. exec "$python" -m ci.soak "$@"
