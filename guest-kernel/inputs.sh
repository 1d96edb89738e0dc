#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# inputs.sh           print the hash of everything that determines the kernel image
# inputs.sh --list    print what goes into it
#
# A caller keeps the result of build.sh under this hash: $CACHE/guest-kernel/HASH/vmlinux.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
. "$here/common.sh"

case ${1-} in
    '') inputs_hash ;;
    --list) inputs ;;
    *) echo "usage: inputs.sh [--list]" >&2; exit 2 ;;
esac
