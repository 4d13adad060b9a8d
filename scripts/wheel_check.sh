#!/usr/bin/env bash
# Installs a wheel into a fresh environment, as a user would, and tries what is in it; then says what the binary is made of.
#
#   scripts/wheel_check.sh WHEEL [UNSTRIPPED]
#
# UNSTRIPPED is the same program with its symbols (default: target/dist/mlx-quant, if it is there): code by crate.
# No network; needs python3 with venv (PYTHON: another one).
set -euo pipefail

fail() { echo "wheel_check.sh: $*" >&2; exit 1; }
step() { printf '\n== %s\n' "$*"; }

[[ $# -ge 1 && -f $1 ]] || { echo "usage: scripts/wheel_check.sh WHEEL [UNSTRIPPED]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
unstripped=${2:-$root/target/dist/mlx-quant}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv="$work/an environment" # paths with spaces must do
bin=$venv/bin
commands=(convert awq gptq dynamic_quant dwq)

step "install ($(basename "$wheel"))"
"${PYTHON:-python3}" -m venv "$venv"
for command in "${commands[@]}"; do echo "mlx-lm's own" >"$bin/mlx_lm.$command"; done
"$bin/python" -m pip install -q --disable-pip-version-check --no-index "$wheel"
"$bin/python" -m pip show -f mlx-quant | sed -n '/^Files:/,$p'

step "mlx-lm's commands are left alone"
if "$bin/python" -m pip show -f mlx-quant | grep -q 'mlx_lm'; then fail "the wheel has files of mlx-lm's names"; fi
for command in "${commands[@]}"; do
  [[ $(cat "$bin/mlx_lm.$command") == "mlx-lm's own" ]] || fail "mlx_lm.$command was overwritten"
done
echo ok

step "mlx-quant --version"
"$bin/mlx-quant" --version

step "commands under mlx-lm's names"
mkdir "$work/links"
for command in "${commands[@]}"; do
  expected="Usage: mlx-quant ${command//_/-} "
  "$bin/mlx_quant.$command" --help | grep -F "$expected" || fail "mlx_quant.$command --help does not say '$expected'"
  ln -s "../an environment/bin/mlx_quant.$command" "$work/links/$command"
  (cd "$work" && "links/$command" --help) | grep -qF "$expected" || fail "mlx_quant.$command does not work through a link"
  ln -s "$bin/mlx-quant" "$work/links/mlx_lm.$command"
  "$work/links/mlx_lm.$command" --help >/dev/null || fail "a link named mlx_lm.$command to mlx-quant does not work"
done

step "demo"
(cd "$work" && "$bin/mlx-quant" convert -q --mlx-path demo && "$bin/mlx-quant" eval --model demo --windows 4)

step "completions and man pages"
share=$venv/share
for file in bash-completion/completions/mlx-quant zsh/site-functions/_mlx-quant fish/vendor_completions.d/mlx-quant.fish \
  man/man1/mlx-quant.1 man/man1/mlx-quant-{convert,awq,gptq,dynamic-quant,dwq,quantize,eval,compare,recommend,devices,inspect}.1; do
  [[ -s $share/$file ]] || fail "share/$file is missing"
done
bash -n "$share/bash-completion/completions/mlx-quant"
(cd "$share" && find . -type f | sort)

step "what the binary is made of"
bytes() { printf '%12d  %s\n' "$1" "$2"; }
files() { cat "$@" | wc -c; }
bytes "$(files "$wheel")" "wheel"
bytes "$(files "$bin/mlx-quant")" "binary, as installed"
bytes "$(files "$root"/crates/demo/files/* "$root"/crates/demo-blocks/files/*)" "of it the demo model (crates/demo/files, crates/demo-blocks/files)"
bytes "$(files "$root"/crates/texts/files/*)" "of it the built-in texts (crates/texts/files)"
if [[ $(uname -s) == Darwin ]]; then
  size -m "$bin/mlx-quant"
else
  printf '\n%12s  section (above 100 kB)\n' bytes
  size -A "$bin/mlx-quant" | awk '$1 ~ /^[.]/ && $2 > 100000 { printf "%12d  %s\n", $2, $1 }' | sort -rn
  if nm --demangle --print-size --radix=d --defined-only "$unstripped" >"$work/symbols" 2>/dev/null && [[ -s $work/symbols ]]; then
    # Generic code counts for the crate that it is written in; names without :: are C and assembly (aws-lc, mimalloc, zstd).
    printf '\n%12s  code by crate (%s)\n' bytes "${unstripped#"$root"/}"
    awk '$3 ~ /^[tTwW]$/ {
      size = $2; $1 = $2 = $3 = ""; name = $0
      while (sub(/^([ <&*([]+|(dyn|mut|const) )/, "", name)) {}
      crate = name ~ /::/ ? name : "C and assembly"
      sub(/::.*/, "", crate)
      sum[crate] += size
    } END { for (crate in sum) printf "%12d  %s\n", sum[crate], crate }' "$work/symbols" | sort -rn >"$work/crates"
    head -20 "$work/crates"
  fi
fi

step "uninstall"
"$bin/python" -m pip uninstall -q --disable-pip-version-check -y mlx-quant
for command in "${commands[@]}"; do [[ -s $bin/mlx_lm.$command ]] || fail "uninstalling took mlx_lm.$command away"; done
if compgen -G "$bin/mlx?quant*" >/dev/null; then fail "uninstalling left something behind"; fi
echo ok
