# SPDX-License-Identifier: Apache-2.0
#
# Shared by build.sh and inputs.sh: where things are, and which source is built. To be sourced;
# $here is the folder of the scripts.
# shellcheck shell=sh

export LC_ALL=C TZ=UTC

die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }
note() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# shellcheck source=kernel.lock
. "$here/kernel.lock"

# Results, and source packages already fetched, live outside the tree.
cache=${CAISSON_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/caisson}/guest-kernel

# The version of the source package that apt would fetch; nothing if apt knows none.
offered_version() {
    command -v apt-cache >/dev/null 2>&1 || return 0
    apt-cache policy "$KERNEL_PACKAGE" 2>/dev/null |
        sed -n 's/^  Candidate: //p' | grep -vxF '(none)' || true
}

# The version to build: what apt offers, else the newest package or result in the cache.
source_version() {
    version=$(offered_version)
    if [ -z "$version" ]; then
        version=$(
            {
                find "$cache/source" -name "${KERNEL_PACKAGE}_*.deb" 2>/dev/null |
                    sed 's/.*_\(.*\)_[a-z0-9]*\.deb$/\1/; s/%3a/:/'
                sed -n "s/^package $KERNEL_PACKAGE //p" "$cache"/*/source 2>/dev/null
            } | sort -V | tail -n 1
        )
        [ -z "$version" ] || note "apt offers no $KERNEL_PACKAGE; the cache has $version"
    fi
    [ -n "$version" ] || die "apt offers no $KERNEL_PACKAGE (is its archive enabled, was 'apt-get update' run?) and the cache in $cache has none; an upstream tarball can be given by KERNEL_TARBALL and KERNEL_SHA256"
    printf '%s\n' "$version"
}

# One line that names the source exactly.
source_id() {
    if [ -n "$KERNEL_SHA256" ]; then
        printf 'tarball sha256:%s\n' "$KERNEL_SHA256"
    else
        version=$(source_version) || exit 1
        printf 'package %s %s\n' "$KERNEL_PACKAGE" "$version"
    fi
}

# Everything that determines the image, one item per line.
inputs() {
    source_id || exit 1
    { gcc --version 2>/dev/null || echo 'gcc: not installed'; } | head -n 1
    { ld --version 2>/dev/null || echo 'ld: not installed'; } | head -n 1
    (cd "$here" && sha256sum kernel.lock common.sh build.sh check.sh inputs.sh elf-trim.c fragments/*.config patches/*.patch)
}

inputs_hash() {
    listing=$(inputs) || exit 1
    printf '%s\n' "$listing" | sha256sum | cut -d ' ' -f 1
}
