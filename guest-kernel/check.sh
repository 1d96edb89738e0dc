#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# check.sh CONFIG           does the final configuration hold every option that the fragments ask for?
# check.sh --image VMLINUX  can the image be entered by PVH?
#
# Kconfig drops what has an unmet dependency without a word, and "select" brings back what was
# turned off; both end here, by name.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)

if [ "${1-}" = --image ]; then
    # Xen note 18 (0x12) holds the 32-bit entry point; without it a VMM cannot start the image.
    LC_ALL=C readelf -nW "$2" 2>/dev/null | awk '
        $1 == "Xen" && ($0 ~ /0x0*12[^0-9a-f]/) { found = 1 }
        END { exit !found }' || { echo "check.sh: $2 has no PVH entry (Xen ELF note 18)" >&2; exit 1; }
    exit 0
fi
[ $# -eq 1 ] || { echo "usage: check.sh CONFIG | check.sh --image VMLINUX" >&2; exit 2; }

awk '
    function name_of(line) {
        if (match(line, /^CONFIG_[A-Za-z0-9_]+=/))
            return substr(line, 1, RLENGTH - 1)
        if (line ~ /^# CONFIG_[A-Za-z0-9_]+ is not set$/)
            return $2
        return ""
    }
    function value_of(line) { return line ~ /^#/ ? "n" : substr(line, index(line, "=") + 1) }
    FNR == 1 { file = FILENAME; sub(/.*\//, "", file); files++ }
    {
        n = name_of($0)
        if (n == "") next
        v = value_of($0)
    }
    files == 1 { final[n] = v; next }
    n in asked && asked[n] != v { printf "%s: %s here, %s in %s\n", n, v, asked[n], from[n]; bad++ }
    n in asked { if (asked[n] == v) { printf "%s: twice, in %s and %s\n", n, from[n], file; bad++ } next }
    {
        asked[n] = v; from[n] = file; total++
        got = n in final ? final[n] : "n"
        if (got != v) { printf "%s: %s asks for %s, the final configuration has %s\n", n, file, v, got; bad++ }
    }
    END {
        if (bad) { printf "%d of %d options are not as the fragments ask\n", bad, total; exit 1 }
        printf "configuration: all %d options are as the fragments ask\n", total
    }
' "$1" "$here"/fragments/*.config >&2
