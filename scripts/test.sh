#!/usr/bin/env bash
# Install into .venv if needed and run the tests. Arguments go to pytest, such as: bash scripts/test.sh -m slow
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec python -m pytest "$@"
