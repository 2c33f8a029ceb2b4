#!/usr/bin/env bash
# All tests, 3 minutes on 2 cores after the packages are installed. On a machine with a GPU they test
# that too.
set -euo pipefail
cd "$(dirname "$0")"
[ -d .venv ] || python3 -m venv .venv
. .venv/bin/activate
pip install -q -r requirements.txt -r requirements-dev.txt
python -m pytest -q -n 2 --dist loadfile "$@"
