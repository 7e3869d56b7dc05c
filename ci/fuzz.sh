#!/usr/bin/env bash
# Fuzz every target for the given seconds (default 60); see ci/build/fuzz.py and doc/security.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

exec ./build.sh fuzz "${1:-60}"
