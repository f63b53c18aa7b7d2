#!/usr/bin/env bash
# Makes sure that there is a headless browser: the tests open reports in one.
set -euo pipefail

for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null && "$name" --version >/dev/null 2>&1; then
        exit 0
    fi
done

as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo -n)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if command -v apt-get >/dev/null; then
    echo "Installing Chromium, in which the tests open reports."
    export DEBIAN_FRONTEND=noninteractive
    if { "${as_root[@]}" apt-get update &&
        "${as_root[@]}" apt-get install --yes --no-install-recommends chromium; } \
        >"$log" 2>&1 </dev/null; then
        exit 0
    fi
    tail -n 5 "$log" >&2
fi
echo "Install Chromium or Google Chrome to run the tests (Debian: apt-get install chromium)." >&2
exit 1
