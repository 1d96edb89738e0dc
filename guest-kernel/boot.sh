#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Boot an image once under QEMU's emulator (no KVM needed), to see that it works and what it costs.
#
#   boot.sh VMLINUX [KERNEL PARAMETER...]     print the whole console
#   boot.sh --memory VMLINUX                  print the memory used when PID 1 starts, in a 128 MiB guest
#   boot.sh --initcalls VMLINUX               print the 30 slowest initcalls, in virtual microseconds
#
# MEMORY (MiB, 128), CPUS (1), TIMEOUT (s, 120) and INITRAMFS (our own PID 1) come from the environment.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
export LC_ALL=C

mode=console
case ${1-} in
    --memory) mode=memory; shift ;;
    --initcalls) mode=initcalls; shift ;;
    --*) set -- ;;
esac
[ $# -ge 1 ] || { sed -n 's/^#   \(boot.sh.*\)/\1/p' "$0" >&2; exit 2; }
image=$1
shift

if ! command -v qemu-system-x86_64 >/dev/null 2>&1; then
    echo "memory used at init: not measured, qemu-system-x86_64 is not installed"
    [ $mode = memory ] && exit 0
    exit 1
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/caisson-boot.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# A cpio archive (newc) with one file, /init.
make_initramfs() {
    gcc -Os -static -nostdlib -ffreestanding -mgeneral-regs-only -fno-stack-protector -fno-asynchronous-unwind-tables \
        -Wl,--build-id=none,-z,norelro,-z,noseparate-code -o "$work/init" "$here/init.c"
    strip --strip-all "$work/init"
    entry() { # name mode size
        printf '070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\0' \
            1 "$2" 0 0 1 0 "$3" 0 0 0 0 "$((${#1} + 1))" 0 "$1"
    }
    pad() { # length: to a multiple of 4
        head -c $(((4 - $1 % 4) % 4)) /dev/zero
    }
    size=$(stat -c %s "$work/init")
    {
        entry init 33261 "$size"; pad $((110 + 5))
        cat "$work/init"; pad "$size"
        entry 'TRAILER!!!' 0 0; pad $((110 + 11))
    } >"$work/initramfs"
    INITRAMFS=$work/initramfs
}
[ -n "${INITRAMFS-}" ] || make_initramfs

# The clock is the count of executed instructions (1 ns each), so that a figure does not depend on
# what else the machine does. Without KVM's clock the guest has to be told the frequency.
run() {
    timeout "${TIMEOUT:-120}" qemu-system-x86_64 \
        -M microvm,acpi=off,rtc=on,pit=on,pic=on,x-option-roms=off,auto-kernel-cmdline=on \
        -accel tcg,thread=single -icount shift=0,sleep=off -cpu max -smp "${CPUS:-1}" -m "${MEMORY:-128}" \
        -nodefaults -no-user-config -display none -no-reboot -serial stdio \
        -kernel "$image" -initrd "$INITRAMFS" \
        -append "console=ttyS0 reboot=t panic=-1 tsc=reliable tsc_early_khz=1000000 $*" </dev/null
}

case $mode in
    console)
        run "$@" ;;
    memory)
        run quiet >"$work/console" || true
        awk '
            { sub(/\r$/, "") }
            /^MemFree:/ { free = $2 }
            /^caisson-init: end/ { done = 1 }
            END {
                if (!done) exit 1
                printf "memory used at init (%d MiB guest): %d KiB\n", mib, mib * 1024 - free
            }' mib="${MEMORY:-128}" "$work/console" || {
                echo "boot.sh: the guest did not reach PID 1; the end of its console:" >&2
                tail -n 20 "$work/console" >&2
                exit 1
            } ;;
    initcalls)
        run initcall_debug log_buf_len=4M loglevel=8 >"$work/console" || true
        # "initcall NAME+0x0/0x10 returned 0 after 123 usecs"
        sed -n 's/.*initcall \([^ +]*\).* returned .* after \([0-9]*\) usecs.*/\2 \1/p' "$work/console" |
            sort -rn | head -n 30 ;;
esac
