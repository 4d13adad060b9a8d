#!/usr/bin/env bash
# Looks at a self-contained HTML report in a real Chromium, as people see it: screenshots and checks (scripts/look.py).
#
#   scripts/look.sh FILE.html OUTDIR
#
# Needs chromium, chromium-browser or google-chrome on PATH; without one it says `skipped` and exits 0.
# The first call makes a virtual environment (needs python3 with venv, and pip's index):
#   LOOK_VENV      where it is (default: a folder in $TMPDIR or /tmp)
#   PYTHON         the python it is made with (default: python3)
#   LOOK_REQUIRED  1: exit 1 where there is no chromium
set -euo pipefail

playwright=1.65.2
tmp=${TMPDIR:-/tmp}
venv=${LOOK_VENV:-${tmp%/}/mlx-quant-look-venv-$playwright}

if [[ $# -ne 2 ]]; then
  echo "usage: scripts/look.sh FILE.html OUTDIR" >&2
  exit 2
fi

# No download of playwright's own browser: the system's is driven.
if ! chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome); then
  echo "skipped: no chromium (apt-get install chromium)"
  [[ ${LOOK_REQUIRED:-0} != 1 ]]
  exit
fi

if [[ ! -e $venv/.ready ]]; then
  if ! { "${PYTHON:-python3}" -m venv "$venv" && "$venv/bin/python" -m pip --version >/dev/null; } >&2; then
    echo "look.sh: cannot make a virtual environment in $venv: ${PYTHON:-python3} needs its venv and ensurepip modules (Debian, Ubuntu: the python3-venv package)" >&2
    exit 1
  fi
  "$venv/bin/python" -m pip install -q --disable-pip-version-check "playwright==$playwright" >&2
  : >"$venv/.ready.$$"
  mv "$venv/.ready.$$" "$venv/.ready"
fi

exec "$venv/bin/python" "$(dirname "$0")/look.py" --chromium "$chromium" "$@"
