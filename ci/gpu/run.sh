#!/usr/bin/env bash
# Qualifies the wheel on a machine with NVIDIA GPUs: tests, examples and a small benchmark for each
# transport, and a table of what passed, failed or was skipped, and why. See doc/gpu.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

./build.sh venv
exec .venv/bin/python -m ci.gpu.qualify
