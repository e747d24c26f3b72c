#!/usr/bin/env bash
# run.sh DIR SCRIPT [QEMU ARGUMENT…]: boots the guest of build.sh and runs SCRIPT in it as root, with its output here. The host's
# loopback is 10.0.2.2 there, and 127.0.0.0/8. Standard input is the guest's console. Exit status: the script's; 125 if the guest ended without telling one.
set -euo pipefail
dir=$1 script=$2
shift 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/add"
cp "$script" "$work/add/test.sh"
(cd "$work/add" && find . -name test.sh | cpio --quiet -o -H newc -R 0:0) | cat "$dir/initramfs" - >"$work/initramfs"

accel=tcg cpu=max
if [ -w /dev/kvm ] && grep -qE '^flags.*\b(vmx|svm)\b' /proc/cpuinfo; then accel=kvm:tcg cpu=max; fi
# no_timer_check: under load a timer of an emulated machine comes late, and the kernel would take it for broken.
qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot -machine "pc,accel=$accel" -cpu "$cpu" -m 768 \
	-kernel "$dir/vmlinuz" -initrd "$work/initramfs" -append 'console=ttyS0 panic=-1 mitigations=off nokaslr loglevel=4 no_timer_check audit=0' \
	-netdev user,id=n -device virtio-net-pci,netdev=n,romfile= -serial stdio "$@" 2>&1 |
	sed -u 's/\r//g' | tee "$work/console"
status=$(sed -n 's/^GUEST-STATUS \([0-9]*\)$/\1/p' "$work/console" | tail -n 1)
exit "${status:-125}"
