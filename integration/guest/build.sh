#!/usr/bin/env bash
# build.sh DIR: makes a small Linux guest in DIR (vmlinuz, initramfs): Debian's kernel with its NBD, iSCSI, multipath, ext4 and
# virtio modules, busybox, and Debian's own clients of all that. What is not installed here is taken out of its package
# and nothing of it is installed. An existing guest is kept.
# Needs Debian 12's package lists (apt-get update) and the packages that `make tools` installs.
set -euo pipefail
export PATH=/usr/bin:/bin:/usr/sbin:/sbin LC_ALL=C

dir=$(mkdir -p "$1" && cd "$1" && pwd)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
stamp=$(cat "$here"/{build.sh,init.sh,lib.sh} /etc/debian_version | sha256sum)
[ "$(cat "$dir/stamp" 2>/dev/null || true)" != "$stamp" ] || exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/packages" "$work/root" "$work/stage"
root=$work/root stage=$work/stage

# Not the cloud flavour: it has no scsi_dh_alua.
kernel_package() { apt-cache depends linux-image-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1; }
kernel=$(kernel_package)
if [ -z "$kernel" ]; then
	apt-get -q update
	kernel=$(kernel_package)
fi
[ -n "$kernel" ] || { echo "guest: Debian's package lists name no kernel: run apt-get update" >&2; exit 1; }
packages=(
	busybox-static udev dmsetup libdevmapper1.02.1
	open-iscsi libopeniscsiusr libisns0 libkmod2
	multipath-tools kpartx libaio1 libedit2 libbsd0 libmd0 libjson-c5 liburcu8
	sg3-utils libsgutils2-1.46-2
)
(cd "$work/packages" && apt-get -q download "$kernel" "${packages[@]}")
version=${kernel#linux-image-}
for deb in "$work"/packages/*.deb; do
	# Of the kernel's 4000 modules those that are needed are in these directories.
	case $deb in
	*/linux-image-*) only=(./boot "./lib/modules/$version/kernel/"{arch,block,crypto,fs/ext4,fs/jbd2,fs/mbcache*,lib,net/core,net/packet}
		"./lib/modules/$version/kernel/drivers/"{block,char,md,net/net_failover*,net/virtio_net*,scsi,target,virtio} "./lib/modules/$version/modules.*") ;;
	*) only=(.) ;;
	esac
	dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$stage" --wildcards --no-anchored --exclude=usr/share "${only[@]}" 2>/dev/null || true
done
[ -f "$stage/boot/vmlinuz-$version" ] || { echo "guest: $kernel holds no kernel image" >&2; exit 1; }

# Programs with their libraries: busybox for the shell and small tools, and the real ones that the tests are about.
mkdir -p "$root"/{bin,dev,proc,sys,tmp,run,mnt,etc/iscsi,etc/udev,lib/modules,lib/udev/rules.d,lib/systemd,var/lib/iscsi,var/lib/multipath,lib/multipath}
ln -s bin "$root/sbin"
ln -s ../run "$root/var/run"
ln -s ../run/lock "$root/var/lock"
mkdir "$root/usr"
for d in bin sbin lib; do ln -s "../$d" "$root/usr/$d"; done
install "$stage/bin/busybox" "$root/bin/busybox"
libraries=$stage/lib/x86_64-linux-gnu:$stage/usr/lib/x86_64-linux-gnu:$stage/lib:$stage/usr/lib
put() { # put FILE PATH: into the guest, with the libraries that it needs
	local lib
	[ -e "$root$2" ] || install -D "$1" "$root$2"
	{ LD_LIBRARY_PATH=$libraries ldd "$1" 2>/dev/null || true; } | while read -r name arrow lib _; do
		case "$name $arrow $lib" in
		*'not found'*) echo "guest: $1 needs $name, which is in no package here" >&2; exit 1 ;;
		*/ld-linux*) lib=${name%% *} ;;
		esac
		case $lib in
		"$stage"*) [ -e "$root/lib/${lib##*/}" ] || install -D "$lib" "$root/lib/${lib##*/}" ;;
		/*) [ -e "$root$lib" ] || install -D "$lib" "$root$lib" ;;
		esac
	done
}
for program in nbd-client mke2fs e2fsck resize2fs tune2fs fstrim blkdiscard blockdev sha256sum cmp fio \
	iscsid iscsiadm multipath multipathd dmsetup sg_persist sg_vpd sg_rtpg kmod udevadm; do
	path=
	for at in "$stage"/{bin,sbin,usr/bin,usr/sbin}/"$program" "$(command -v "$program" || true)"; do
		[ -x "$at" ] && { path=$at; break; }
	done
	[ -n "$path" ] || { echo "guest: no $program here: run make tools" >&2; exit 1; }
	put "$path" "/bin/$program"
done
ln -s mke2fs "$root/bin/mkfs.ext4"
for program in modprobe insmod lsmod; do ln -s kmod "$root/bin/$program"; done
ln -s ../../bin/udevadm "$root/lib/systemd/systemd-udevd"
put "$stage/lib/udev/scsi_id" /lib/udev/scsi_id
for plugin in checktur prioalua prioconst priosysfs; do put "$stage/lib/multipath/lib$plugin.so" "/lib/multipath/lib$plugin.so"; done
put /lib/x86_64-linux-gnu/libgcc_s.so.1 /lib/x86_64-linux-gnu/libgcc_s.so.1 # who ends a thread loads it
for rules in 50-udev-default 55-dm 56-dm-mpath 60-block 60-multipath 60-persistent-storage 60-persistent-storage-dm 95-dm-notify; do
	file=$(find "$stage" -name "$rules.rules" | head -n 1)
	[ -z "$file" ] || install -m 644 "$file" "$root/lib/udev/rules.d/"
done
cp /etc/mke2fs.conf "$root/etc/"
mkdir -p "$root"/etc/iscsi/{nodes,send_targets,ifaces,isns,static}
cp "$stage/etc/iscsi/iscsid.conf" "$root/etc/iscsi/"
sed -i 's|^iscsid.startup.*|iscsid.startup = /bin/iscsid|' "$root/etc/iscsi/iscsid.conf"
echo 'InitiatorName=iqn.1993-08.org.debian:01:guest' >"$root/etc/iscsi/initiatorname.iscsi"
echo 'root:x:0:0:root:/:/bin/sh' >"$root/etc/passwd"
printf '%s\n' root:x:0: tty:x:5: disk:x:6: lp:x:7: dialout:x:20: kmem:x:15: cdrom:x:24: audio:x:29: video:x:44: input:x:101: tape:x:26: sgx:x:102: kvm:x:103: render:x:104: >"$root/etc/group"

# Modules with everything that they depend on.
tree=lib/modules/$version
depmod -b "$stage" "$version"
mkdir -p "$root/$tree"
cp "$stage/$tree"/modules.{builtin,builtin.modinfo,order} "$root/$tree/"
for module in virtio_pci virtio_net virtio_blk nbd ext4 crc32c_generic crc32c_intel iscsi_tcp sd_mod sg dm-multipath dm-service-time dm-round-robin scsi_dh_alua af_packet; do
	files=$(modprobe -d "$stage" -S "$version" --show-depends "$module" 2>/dev/null) || { echo "guest: $kernel has no module $module" >&2; exit 1; }
	sed -n 's/^insmod \([^ ]*\).*/\1/p' <<<"$files"
done | sort -u | while read -r file; do
	install -D -m 644 "$file" "$root/${file#"$stage/"}"
done
depmod -b "$root" "$version"

install -m 755 "$here/init.sh" "$root/init"
install -m 644 "$here/lib.sh" "$root/lib.sh"
(cd "$root" && find . | cpio --quiet -o -H newc -R 0:0) >"$dir/initramfs"
cp "$stage/boot/vmlinuz-$version" "$dir/vmlinuz"
printf '%s\n' "$stamp" >"$dir/stamp"
echo "guest: $kernel, $(du -sh "$dir" | cut -f 1)"
