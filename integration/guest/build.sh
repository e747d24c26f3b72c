#!/usr/bin/env bash
# build.sh DIR: makes a small Linux guest in DIR (vmlinuz, initramfs): Debian's cloud kernel with its NBD, ext4 and
# virtio modules, busybox, and this machine's own nbd-client, e2fsprogs and fstrim. An existing one is kept.
# Needs Debian 12's package lists (apt-get update) and the packages that `make tools` installs.
set -euo pipefail
export PATH=/usr/bin:/bin:/usr/sbin:/sbin LC_ALL=C

dir=$(mkdir -p "$1" && cd "$1" && pwd)
stamp=$(cat "${BASH_SOURCE[0]}" /etc/debian_version | sha256sum)
[ "$(cat "$dir/stamp" 2>/dev/null || true)" != "$stamp" ] || exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/packages" "$work/root"
root=$work/root

kernel_package() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1; }
kernel=$(kernel_package)
if [ -z "$kernel" ]; then
	apt-get -q update
	kernel=$(kernel_package)
fi
[ -n "$kernel" ] || { echo "guest: Debian's package lists name no cloud kernel: run apt-get update" >&2; exit 1; }
(cd "$work/packages" && apt-get -q download "$kernel" busybox-static)
for deb in "$work"/packages/*.deb; do dpkg-deb -x "$deb" "$work/stage"; done
version=${kernel#linux-image-}
[ -f "$work/stage/boot/vmlinuz-$version" ] || { echo "guest: $kernel holds no kernel image" >&2; exit 1; }

# Programs: busybox for the shell and small tools, and the real ones that the tests are about.
mkdir -p "$root"/{bin,sbin,dev,proc,sys,tmp,run,mnt,etc,var/lock,var/run,lib/modules}
install "$work/stage/bin/busybox" "$root/bin/busybox"
for program in nbd-client mke2fs e2fsck resize2fs tune2fs fstrim blkdiscard blockdev sha256sum cmp; do
	path=$(command -v "$program") || { echo "guest: no $program here: run make tools" >&2; exit 1; }
	install "$path" "$root/bin/$program"
	{ ldd "$path" 2>/dev/null || true; } | grep -o '/[^ ]*' | while read -r lib; do
		[ -e "$root$lib" ] || install -D "$lib" "$root$lib"
	done
done
ln -s mke2fs "$root/bin/mkfs.ext4"
cp /etc/mke2fs.conf "$root/etc/"

# Modules with everything that they depend on.
tree=lib/modules/$version
stage=$work/stage
depmod -b "$stage" "$version"
mkdir -p "$root/$tree"
cp "$stage/$tree"/modules.{builtin,order} "$root/$tree/"
for module in virtio_pci virtio_net nbd ext4 crc32c_generic; do
	{ modprobe -d "$stage" -S "$version" --show-depends "$module" 2>/dev/null || true; } | sed -n 's/^insmod \([^ ]*\).*/\1/p'
done | sort -u | while read -r file; do
	install -D -m 644 "$file" "$root/${file#"$stage/"}"
done
[ -n "$(find "$root/$tree" -name 'nbd.ko*')" ] || { echo "guest: $kernel has no nbd module" >&2; exit 1; }
depmod -b "$root" "$version"

# The guest's first process: it prepares the machine, runs /test.sh, tells its status and ends the machine.
cat >"$root/init" <<'INIT'
#!/bin/busybox sh
export PATH=/bin:/sbin
/bin/busybox --install -s /bin 2>/dev/null
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for m in virtio_pci virtio_net ext4; do modprobe $m; done
modprobe nbd max_part=0
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
sh /test.sh </dev/null 2>&1
echo "GUEST-STATUS $?"
sync
reboot -f
INIT
chmod 755 "$root/init"

(cd "$root" && find . | cpio --quiet -o -H newc -R 0:0) >"$dir/initramfs"
cp "$stage/boot/vmlinuz-$version" "$dir/vmlinuz"
printf '%s\n' "$stamp" >"$dir/stamp"
echo "guest: $kernel, $(du -sh "$dir" | cut -f 1)"
