#!/usr/bin/env bash
# Prints the formula of a release: mlx-quant.rb with its version and the checksums of its four archives.
#
#   packaging/homebrew/update.sh VERSION DIR > mlx-quant.rb
#
# DIR holds mlx-quant-VERSION-TARGET.tar.gz.sha256 of every target, as scripts/package.sh writes them.
set -euo pipefail

[[ $# -eq 2 ]] || { echo "usage: packaging/homebrew/update.sh VERSION DIR" >&2; exit 2; }
version=$1
directory=$2
fill=(-e "s/@version@/$version/g")
for target in {aarch64,x86_64}-{apple-darwin,unknown-linux-gnu}; do
  read -r sum _ <"$directory/mlx-quant-$version-$target.tar.gz.sha256"
  [[ $sum =~ ^[0-9a-f]{64}$ ]] || { echo "update.sh: $target: not a SHA-256: $sum" >&2; exit 1; }
  fill+=(-e "s/@$target@/$sum/")
done
formula=$(sed -e '1d' "${fill[@]}" "$(dirname "$0")/mlx-quant.rb")
if grep '@' <<<"$formula" >&2; then echo "update.sh: not filled in" >&2; exit 1; fi
printf '%s\n' "$formula"
