#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes the testbed's root file system and kernel: build.sh OUT
#
#   OUT/rootfs/          Debian 12 with the packages of packages.txt
#   OUT/vmlinux          that root's kernel, unpacked from its bzImage, so that QEMU boots it by PVH
#   OUT/kernel-release   its `uname -r`
#   OUT/manifest         every package installed, with its version
#
# Packages come from the archives that the machine's own apt uses for Debian 12, or, on another
# distribution, from mmdebstrap's default. Needs root (device nodes, file owners) and mmdebstrap.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=$1
suite=bookworm
mkdir -p "$out"
packages=$(sed -e 's/#.*//' "$here/packages.txt" | xargs | tr ' ' ',')

# One line per archive of Debian 12 that this machine's apt knows, the security archive among them.
sources=$(apt-get indextargets --format '$(ORIGIN) $(CODENAME) $(REPO_URI) $(RELEASE) $(COMPONENT)' \
            'Identifier: Packages' 2>/dev/null |
          awk -v s="$suite" '$1 == "Debian" && ($2 == s || index($2, s "-") == 1) && $2 !~ /backports/ && $5 == "main" \
                 { print "deb " $3 " " $4 " " $5 }' |
          sort -u)
proxies=()
for kind in http https; do
    url=
    eval "$(apt-config shell url "Acquire::$kind::Proxy")"
    if [ -n "$url" ]; then proxies+=(--aptopt="Acquire::$kind::Proxy \"$url\""); fi
done

# INITRD=No: the testbed has an initramfs of its own, so the kernel's package must not make one.
export INITRD=No
mmdebstrap --mode=root --variant=minbase --format=directory --include="$packages" \
    --aptopt='Acquire::Retries "5"' "${proxies[@]}" \
    --dpkgopt='force-unsafe-io' \
    --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook='rm -f "$1"/boot/initrd* "$1"/etc/resolv.conf; echo testbed >"$1/etc/hostname"' \
    "$suite" "$out/rootfs" ${sources:+-} <<<"$sources"

release=$(ls "$out/rootfs/lib/modules")
printf '%s\n' "$release" >"$out/kernel-release"
chroot "$out/rootfs" dpkg-query -W -f '${Package} ${Version}\n' >"$out/manifest"

# The compressed kernel inside a bzImage: Documentation/arch/x86/boot.rst, payload_offset and
# payload_length, counted from the end of the real-mode sectors. A zstd or xz payload is followed by
# its unpacked size, four bytes that are no part of the stream.
image=$out/rootfs/boot/vmlinuz-$release
field() { od -An -v -t "u$2" -j "$1" -N "$2" "$image" | tr -d ' '; }
start=$(( ($(field $((0x1f1)) 1) + 1) * 512 + $(field $((0x248)) 4) ))
length=$(( $(field $((0x24c)) 4) - 4 ))
payload() { dd if="$image" bs=1M iflag=skip_bytes,count_bytes skip="$start" count="$length" status=none; }
case $(od -An -t x1 -j "$start" -N 4 "$image" | tr -d ' ') in
    28b52ffd) payload | chroot "$out/rootfs" zstd -dcq >"$out/vmlinux" ;;
    fd377a58) payload | chroot "$out/rootfs" xz -dc --single-stream >"$out/vmlinux" ;;
    1f8b08*)  payload | gzip -dc >"$out/vmlinux" ;;
    *) echo "$image is compressed in a way that is not known here" >&2; exit 1 ;;
esac
