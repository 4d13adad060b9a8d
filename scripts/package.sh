#!/usr/bin/env bash
# Makes what is released, for the platform that it runs on:
#
#   target/wheels/mlx_quant-VERSION-*.whl                      for PyPI
#   target/archives/mlx-quant-VERSION-TARGET.tar.gz, and .sha256   for GitHub releases, cargo-binstall, Homebrew
#
# On Linux it is one build (profile dist: everything optimized as a whole) against glibc 2.17, with zig as C compiler and linker; on macOS the system's own tools.
# Both files hold the same binary, completions and man pages.
#
# The first call makes a virtual environment (needs python3 with venv, and pip's index):
#   PACKAGE_VENV     where it is (default: ~/.cache/mlx-quant/package-venv)
#   PYTHON           the python it is made with (default: python3)
#   MLX_QUANT_PLAIN  1: on Linux, build without zig: for this machine only, the wheel is tagged linux_* and PyPI refuses it
set -euo pipefail
cd "$(dirname "$0")/.."

maturin=1.16.0
auditwheel=6.8.2
ziglang=0.17.1
venv=${PACKAGE_VENV:-$HOME/.cache/mlx-quant/package-venv}
ready=$venv/.ready-$maturin-$auditwheel-$ziglang

# The oldest glibc that a wheel may ask for at most: 2.28, that of Debian 10, RHEL 8 and what PyPI's own tools build for.
newest_glibc=2.28

if [[ ! -e $ready ]]; then
  if ! { "${PYTHON:-python3}" -m venv "$venv" && "$venv/bin/python" -m pip --version >/dev/null; } >&2; then
    echo "package.sh: cannot make a virtual environment in $venv: ${PYTHON:-python3} needs its venv and ensurepip modules (Debian, Ubuntu: the python3-venv package)" >&2
    exit 1
  fi
  packages=("maturin==$maturin")
  [[ $(uname -s) != Linux ]] || packages+=("auditwheel==$auditwheel" "ziglang==$ziglang")
  "$venv/bin/python" -m pip install -q --disable-pip-version-check "${packages[@]}" >&2
  : >"$ready"
fi
export PATH="$venv/bin:$PATH"

target=$(rustc -vV | sed -n 's/^host: //p')
how=(--zig --compatibility manylinux2014)
audited=1
if [[ $(uname -s) == Darwin ]]; then
  how=(--compatibility pypi)
  audited=0
  export MACOSX_DEPLOYMENT_TARGET=${MACOSX_DEPLOYMENT_TARGET:-11.0}
elif [[ ${MLX_QUANT_PLAIN:-0} == 1 ]]; then
  how=(--compatibility linux)
  audited=0
fi

step() { printf '\n== %s\n' "$*"; }

work=target/package
data=packaging/wheel/data
rm -rf "$work" "$data"
mkdir -p "$work" target/wheels target/archives

# Builds a wheel into $work/NAME and unpacks it there; sets $wheel and $binary.
build() {
  maturin build --profile dist --target "$target" "${how[@]}" --out "$work/$1"
  wheel=$(echo "$work/$1"/*.whl)
  python -m zipfile -e "$wheel" "$work/$1/unpacked"
  binary=$(echo "$work/$1"/unpacked/mlx_quant-*.data/scripts/mlx-quant)
  chmod +x "$binary"
}

step "binary ($target)"
build bare

step "completions and man pages"
mkdir -p "$data"/share/{man/man1,bash-completion/completions,zsh/site-functions,fish/vendor_completions.d}
"$binary" completions bash >"$data/share/bash-completion/completions/mlx-quant"
"$binary" completions zsh >"$data/share/zsh/site-functions/_mlx-quant"
"$binary" completions fish >"$data/share/fish/vendor_completions.d/mlx-quant.fish"
"$binary" man "$data/share/man/man1"

step "wheel (packs the same binary again, with these)"
bare=$binary
build whole
cmp "$bare" "$binary"

if [[ $audited == 1 ]]; then
  step "auditwheel"
  auditwheel show "$wheel"
  auditwheel show --json "$wheel" | python -c '
import json, re, sys
tag = json.load(sys.stdin)["overall_tag"]
found = re.fullmatch(r"manylinux_(\d+)_(\d+)_\w+", tag)
newest = tuple(map(int, sys.argv[1].split(".")))
if not found or tuple(map(int, found.groups())) > newest:
    sys.exit(f"package.sh: the binary is {tag}: it needs more than glibc {sys.argv[1]}")
' "$newest_glibc"
fi

step "archive"
version=$("$binary" -V | cut -d' ' -f2)
name=mlx-quant-$version-$target
mkdir -p "$work/$name/bin-compat"
cp "$binary" README.md CHANGELOG.md LICENSE-MIT LICENSE-APACHE "$work/$name"
cp crates/texts/SOURCES.md "$work/$name"
cp -R "$data/share" "$work/$name"
for command in convert awq gptq dynamic_quant dwq; do
  ln -s ../mlx-quant "$work/$name/bin-compat/mlx_lm.$command"
done
COPYFILE_DISABLE=1 tar -C "$work" -czf "target/archives/$name.tar.gz" "$name"
(
  cd target/archives
  if command -v sha256sum >/dev/null; then sha256sum "$name.tar.gz"; else shasum -a 256 "$name.tar.gz"; fi >"$name.tar.gz.sha256"
)
mv "$wheel" target/wheels/

step "done"
bytes() { printf '%12d  %s\n' "$(wc -c <"$1")" "${2:-$1}"; }
bytes "target/wheels/$(basename "$wheel")"
bytes "target/archives/$name.tar.gz"
bytes "$binary" "the binary in them, stripped"
