#!/usr/bin/env bash
# Run integration tests with address and undefined-behavior checks in the agent; see ci/build/asan.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

exec ./build.sh asan "$@"
