#!/usr/bin/env bash
# The demonstration behind `make demo`: one sheep on this machine, a real file system on a volume, put there and checked over
# NBD. EXIT=1 stops when done, with the result as exit status; else it stays up until Ctrl-C. IMAGE=file takes that raw or qcow2
# image instead of making one. DATA=dir keeps the volumes there (else they are in a new directory that goes away again).
# ADDRESS=127.0.0.2 listens there.
set -euo pipefail
export PATH=$PWD/bin:/usr/bin:/bin:/usr/sbin:/sbin:$PATH LC_ALL=C.UTF-8

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() { printf '  $ %s\n' "$*"; "$@"; }
die() { echo "demo: $*" >&2; exit 1; }

address=${ADDRESS:-127.0.0.1}
work=$(mktemp -d "${TMPDIR:-/var/tmp}/sheepdog-demo.XXXXXX")
data=${DATA:-$work/data}
sheep='' fuse=''
cleanup() {
	local status=$?
	trap - EXIT INT TERM
	unmount
	if [ -n "$sheep" ]; then
		kill "$sheep" 2>/dev/null || true
		wait "$sheep" 2>/dev/null || true
	fi
	rm -rf "$work"
	exit "$status"
}
unmount() {
	[ -n "$fuse" ] || return 0
	umount "$work/mnt" 2>/dev/null || fusermount3 -u "$work/mnt" 2>/dev/null || kill "$fuse" 2>/dev/null || true
	wait "$fuse" 2>/dev/null || true
	fuse=''
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "1. A sheep: a cluster of one node, formatted, on $address alone"
for port in 7003 10809; do # another sheep's volumes are not ours to write to
	if (exec 3<>"/dev/tcp/$address/$port") 2>/dev/null; then
		die "something listens on $address:$port already; another address will do: make demo ADDRESS=127.0.0.2"
	fi
done
mkdir -p "$data"
echo "  \$ sheep --standalone --data $data"
SHEEP_NODE_ADDRESS=$address sheep --standalone --data "$data" >"$work/log" 2>&1 &
sheep=$!
export DOG_ADDRESS=$address:7003
for _ in $(seq 200); do
	dog -a "$address:7003" cluster info >/dev/null 2>&1 && break
	kill -0 "$sheep" 2>/dev/null || { cat "$work/log" >&2; die "the sheep ended"; }
	sleep 0.05
done
kill -0 "$sheep" 2>/dev/null || { cat "$work/log" >&2; die "the sheep ended"; }
dog() { command dog -a "$address:7003" "$@"; }
show dog node list

if [ -n "${IMAGE:-}" ]; then
	say "2. The image: $IMAGE"
	image=$IMAGE
	[ -r "$image" ] || die "cannot read $image"
	format=$(qemu-img info --output=json "$image" | python3 -c 'import json,sys; print(json.load(sys.stdin)["format"])')
else
	image=$work/image.raw format=raw
	tree=$(go env GOROOT)/src
	say "2. An ext4 image of 768 MiB with Go's source tree in it"
	truncate -s 768M "$image"
	show mke2fs -q -F -t ext4 -L demo -d "$tree" "$image"
fi
size=$(qemu-img info --output=json "$image" | python3 -c 'import json,sys; print(json.load(sys.stdin)["virtual-size"])')
raw=$image
if [ "$format" != raw ]; then
	raw=$work/image.raw
	qemu-img convert -f "$format" -O raw "$image" "$raw"
fi

uri=nbd://$address/vm1
say "3. Onto volume vm1, over NBD"
if dog vdi info vm1 >/dev/null 2>&1; then die "there is a volume vm1 in $data already"; fi
show dog vdi create vm1 "$size"
progress=''
if [ -t 1 ]; then progress=-p; fi
show qemu-img convert -n $progress -f raw -O raw "$raw" "$uri"

say "4. A snapshot, which is an export of its own"
show dog vdi snapshot vm1 -s first
show dog vdi list
show nbdinfo --list "nbd://$address" | grep -E 'export=|export-size' || true

say "5. Compared bit for bit, over NBD: the volume, the snapshot, and the way back out"
show qemu-img compare -f raw -F raw "$raw" "$uri"
show qemu-img compare -f raw -F raw "$raw" "$uri@first"
show nbdcopy "$uri" "$work/back.raw"
show cmp "$raw" "$work/back.raw"
rm -f "$work/back.raw"

say "6. The file system, checked through the export"
if [ "$(blkid -o value -s TYPE "$raw" 2>/dev/null || true)" != ext4 ]; then
	echo "  (the image is not a bare ext4 file system: e2fsck does not apply)"
elif [ -w /dev/fuse ]; then
	mkdir -p "$work/mnt"
	echo "  \$ nbdfuse $work/mnt/vm1 $uri &"
	nbdfuse "$work/mnt/vm1" "$uri" >"$work/fuse.log" 2>&1 &
	fuse=$!
	for _ in $(seq 100); do
		[ -e "$work/mnt/vm1" ] && break
		kill -0 "$fuse" 2>/dev/null || { cat "$work/fuse.log" >&2; die "nbdfuse ended"; }
		sleep 0.05
	done
	show e2fsck -f -n "$work/mnt/vm1"
	unmount
else
	echo "  (no /dev/fuse here, so e2fsck reads a copy that nbdcopy makes of the export)"
	nbdcopy "$uri" "$work/back.raw"
	show e2fsck -f -n "$work/back.raw"
	rm -f "$work/back.raw"
fi
show dog vdi check vm1

say "All of it is as it should be. Use it:"
cat <<USE
  qemu-system-x86_64 -drive file=$uri,format=raw,if=virtio …
  nbd-client $address -N vm1 /dev/nbd0
  nbdinfo --list nbd://$address          qemu-img info $uri@first
  bin/dog vdi list                       http://$address:7003/
USE
[ -z "${EXIT:-}" ] || exit 0
say "Up until Ctrl-C."
wait "$sheep"
