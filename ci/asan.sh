#!/usr/bin/env bash
# Integration tests with the agent under address and undefined-behaviour checks; see ci/build/asan.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

exec ./build.sh asan "$@"
