#!/usr/bin/env bash
# Runs Python with the real, pinned MLX and mlx-lm: the reference that mlx-quant is compared with.
#
#   scripts/mlx.sh SCRIPT.py ARGS...    (or any other arguments of python)
#
# The first call makes a virtual environment (needs python3 with venv, and pip's index):
#   MLX_VENV      where it is (default: a folder in $TMPDIR or /tmp)
#   PYTHON        the python it is made with (default: python3)
#   MLX_OPENBLAS  0: do not preload Debian's OpenBLAS in place of the slow BLAS of mlx-cpu.
#                 Only float matrix products gain; it is never required, and benchmarks leave it out.
set -euo pipefail

mlx=0.32.4
mlx_lm=0.32.2
tmp=${TMPDIR:-/tmp}
venv=${MLX_VENV:-${tmp%/}/mlx-quant-venv-$mlx-$mlx_lm}

fetch_openblas() {
  mkdir -p "$venv/openblas"
  cd "$venv/openblas"
  { command -v apt-get && command -v dpkg; } >/dev/null || return 1
  apt-get download -qq libopenblas0-pthread libgfortran5 libquadmath0 ||
    { apt-get update -qq && apt-get download -qq libopenblas0-pthread libgfortran5 libquadmath0; } ||
    return 1
  for deb in *.deb; do dpkg -x "$deb" . || return 1; done
}

if [[ ! -e $venv/.ready ]]; then
  packages=("mlx==$mlx" "mlx-lm==$mlx_lm" numpy)
  [[ $(uname -s) != Linux ]] || packages+=("mlx-cpu==$mlx")
  if ! { "${PYTHON:-python3}" -m venv "$venv" && "$venv/bin/python" -m pip --version >/dev/null; } >&2; then
    echo "mlx.sh: cannot make a virtual environment in $venv: ${PYTHON:-python3} needs its venv and ensurepip modules (Debian, Ubuntu: the python3-venv package)" >&2
    exit 1
  fi
  "$venv/bin/python" -m pip install -q --disable-pip-version-check "${packages[@]}" >&2
  : >"$venv/.ready.$$"
  mv "$venv/.ready.$$" "$venv/.ready"
fi

if [[ ${MLX_OPENBLAS:-1} != 0 && $(uname -s) == Linux ]]; then
  [[ -d $venv/openblas ]] || (fetch_openblas) >/dev/null 2>&1 || true
  lib=$venv/openblas/usr/lib/$(uname -m)-linux-gnu
  if [[ -e $lib/openblas-pthread/libopenblas.so.0 && -e $lib/libgfortran.so.5 ]]; then
    export LD_LIBRARY_PATH=$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export LD_PRELOAD=$lib/libgfortran.so.5:$lib/openblas-pthread/libopenblas.so.0
  fi
fi

export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
exec "$venv/bin/python" "$@"
