#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Build the guest kernel.
#
#   build.sh [--out DIR] [--jobs N] [--source TARBALL --sha256 HEX] [--no-measure]
#
# Leaves DIR/vmlinux and DIR/config (and DIR/source, the line that names the source). Without --out
# DIR is the cache's place for these inputs, nothing is built if the image is there already, and
# `latest` in the cache then points to it. All work is done in a temporary directory: the tree is
# never written to.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)

usage() { sed -n 's/^#   \(build.sh.*\)/usage: \1/p' "$0" >&2; exit 2; }

out='' jobs=$(nproc) measure=yes
while [ $# -gt 0 ]; do
    case $1 in
        --out|--jobs|--source|--sha256)
            [ $# -ge 2 ] || usage
            case $1 in
                --out) out=$2 ;;
                --jobs) jobs=$2 ;;
                --source) KERNEL_TARBALL=$2 ;;
                --sha256) KERNEL_SHA256=$2 ;;
            esac
            shift 2 ;;
        --no-measure) measure=no; shift ;;
        *) usage ;;
    esac
done
. "$here/common.sh"
[ -z "$KERNEL_TARBALL" ] || [ -n "$KERNEL_SHA256" ] || die "a tarball is used only with its --sha256"
[ -z "$KERNEL_SHA256" ] || [ -n "$KERNEL_TARBALL" ] || die "--sha256 without the --source that it is of"

# --- tools -------------------------------------------------------------------------------------

has_header() { printf '#include <%s>\n' "$1" | gcc -E - >/dev/null 2>&1; }

# Prints the packages that are missing.
missing_tools() {
    for pair in flex:flex bison:bison bc:bc make:make gcc:gcc ld:binutils xz:xz-utils perl:perl-base patch:patch; do
        command -v "${pair%%:*}" >/dev/null 2>&1 || echo "${pair#*:}"
    done
    has_header stdio.h || echo libc6-dev
    has_header gelf.h || echo libelf-dev
    has_header openssl/opensslv.h || echo libssl-dev
}

need_tools() {
    missing=$(missing_tools | tr '\n' ' ')
    [ -n "$missing" ] || return 0
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 || die "missing, install them first: $missing"
    note "installing $missing"
    # shellcheck disable=SC2086
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing; } >&2 ||
        die "could not install: $missing"
    missing=$(missing_tools | tr '\n' ' ')
    [ -z "$missing" ] || die "still missing after installation: $missing"
}

# --- source ------------------------------------------------------------------------------------

# Fetches the source package of the wanted version into the current directory; apt checks it
# against the archive's signed index.
fetch_package() {
    want=$1
    file=${KERNEL_PACKAGE}_$(printf '%s' "$want" | sed 's/:/%3a/g')_all.deb
    sum=$(apt-cache show "$KERNEL_PACKAGE=$want" 2>/dev/null | sed -n 's/^SHA256: //p' | head -n 1)
    kept=$cache/source/$file
    if [ -f "$kept" ]; then
        if [ -z "$sum" ] || echo "$sum  $kept" | sha256sum -c --status; then
            cp "$kept" "$file"
            return 0
        fi
        note "$kept is damaged; fetching it again"
    fi
    note "fetching $KERNEL_PACKAGE $want"
    sandbox=''
    [ "$(id -u)" != 0 ] || sandbox='-o APT::Sandbox::User=root'
    # shellcheck disable=SC2086
    apt-get -qq $sandbox download "$KERNEL_PACKAGE=$want" >&2 ||
        die "could not fetch $KERNEL_PACKAGE $want; with a network, 'apt-get update' may help"
    [ -f "$file" ] || die "apt fetched something else than $file"
    # Kept for builds without a network, where the user has chosen a cache.
    if [ -n "${CAISSON_CACHE-}" ]; then
        mkdir -p "$cache/source"
        cp "$file" "$kept.$$" && mv -f "$kept.$$" "$kept"
    fi
}

# Unpacks the source to $work/linux.
unpack_source() {
    mkdir "$work/linux"
    if [ -n "$KERNEL_TARBALL" ]; then
        [ -f "$KERNEL_TARBALL" ] || die "no such file: $KERNEL_TARBALL"
        echo "$KERNEL_SHA256  $KERNEL_TARBALL" | sha256sum -c --status ||
            die "$KERNEL_TARBALL does not have the sha256 $KERNEL_SHA256"
        tar -xf "$KERNEL_TARBALL" -C "$work/linux" --strip-components=1
        return
    fi
    (
        cd "$work"
        fetch_package "$1"
        dpkg-deb --fsys-tarfile "$file" | tar -xf - --wildcards --strip-components=3 './usr/src/linux-source-*.tar.*'
        rm -f "$file"
        tar -xf linux-source-*.tar.* -C linux --strip-components=1
        rm -f linux-source-*.tar.*
    )
}

# The patches save start-up time and memory, the kernel is right without them. So a source update that
# one of them no longer fits is built all the same, and says so.
apply_patches() {
    for patch in "$here"/patches/*.patch; do
        [ -f "$patch" ] || continue
        if patch -d "$work/linux" -p1 -s -f --dry-run <"$patch" >/dev/null 2>&1; then
            patch -d "$work/linux" -p1 -s -f --no-backup-if-mismatch <"$patch" >&2
        else
            note "does not fit this source, left out: ${patch##*/}"
        fi
    done
}

# --- kernel ------------------------------------------------------------------------------------

# What is found on the builder (rustc, pahole, an outer make's flags) must not reach the configuration.
kmake() {
    make -C "$work/linux" ARCH=x86_64 RUSTC=false PAHOLE=false LOCALVERSION= "$@"
}

configure() {
    kmake -s tinyconfig >"$work/log" 2>&1
    mv "$work/linux/.config" "$work/tiny.config"
    # Whatever no fragment names stays off, also where Kconfig's default is on.
    (cd "$work/linux" && ARCH=x86_64 KCONFIG_CONFIG="$work/wanted.config" scripts/kconfig/merge_config.sh \
        -Q -m "$work/tiny.config" "$here"/fragments/*.config) >>"$work/log" 2>&1
    kmake -s KCONFIG_ALLCONFIG="$work/wanted.config" allnoconfig >>"$work/log" 2>&1
    "$here/check.sh" "$work/linux/.config"
}

build_image() {
    KBUILD_BUILD_TIMESTAMP=$date KBUILD_BUILD_USER=caisson KBUILD_BUILD_HOST=guest KBUILD_BUILD_VERSION=1
    export KBUILD_BUILD_TIMESTAMP KBUILD_BUILD_USER KBUILD_BUILD_HOST KBUILD_BUILD_VERSION
    note "building Linux $(kmake -s kernelversion) with $jobs jobs; this takes some minutes"
    kmake -j"$jobs" vmlinux >"$work/log" 2>&1
    # No symbols, no padding.
    strip --strip-all -o "$work/stripped" "$work/linux/vmlinux"
    gcc -O2 -o "$work/elf-trim" "$here/elf-trim.c"
    "$work/elf-trim" "$work/stripped" "$work/vmlinux"
    "$here/check.sh" --image "$work/vmlinux"
}

# --- the way through ---------------------------------------------------------------------------

unset MAKEFLAGS MFLAGS MAKELEVEL CROSS_COMPILE CC LD KCFLAGS KCPPFLAGS KAFLAGS KBUILD_OUTPUT O LDFLAGS CFLAGS 2>/dev/null || true
umask 022

need_tools
source=$(source_id)
if [ -z "$out" ]; then
    hash=$(inputs_hash)
    out=$cache/$hash
    if [ -f "$out/vmlinux" ] && [ -f "$out/config" ]; then
        note "already built: $out/vmlinux"
        ln -sfn "$hash" "$cache/latest"
        printf 'vmlinux: %s bytes\n' "$(stat -c %s "$out/vmlinux")"
        exit 0
    fi
fi
mkdir -p "$out"
out=$(CDPATH= cd -- "$out" && pwd)

if [ -n "${CAISSON_CACHE-}" ]; then
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/work.XXXXXX")
else
    work=$(mktemp -d "${TMPDIR:-/tmp}/caisson-guest-kernel.XXXXXX")
fi
finish() {
    status=$?
    if [ $status -ne 0 ] && [ -s "$work/log" ]; then
        grep -n 'error:\|Error [0-9]' "$work/log" | head -n 20 >&2 || true
        tail -n 20 "$work/log" >&2
    fi
    rm -rf "$work"
    exit $status
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

unpack_source "${source##* }"
# The date of the source is the date of the build, so that the same inputs give the same bytes.
date=$(date -u -d "@$(stat -c %Y "$work/linux/Makefile")")
apply_patches
configure
build_image

# The image comes last and whole: who finds a vmlinux finds all of it.
printf '%s\n' "$source" >"$out/source"
cp "$work/linux/.config" "$out/config"
cp "$work/vmlinux" "$out/.vmlinux.$$"
mv -f "$out/.vmlinux.$$" "$out/vmlinux"
[ -z "${hash-}" ] || ln -sfn "$hash" "$cache/latest"

printf 'vmlinux: %s bytes\n' "$(stat -c %s "$out/vmlinux")"
[ "$measure" = no ] || "$here/boot.sh" --memory "$out/vmlinux"
