#!/usr/bin/env bash
# The demonstration behind `make demo`: three sheep on this machine that keep three copies of everything, a real file system put on
# a volume over NBD, one of the sheep killed while that is going on, and everything checked afterwards. EXIT=1 stops when done, with
# the result as exit status; else it stays up until Ctrl-C. IMAGE=file takes that raw or qcow2 image instead of making one. DATA=dir
# keeps the volumes there (else they are in a new directory that goes away again). ADDRESS=127.0.0.5 listens there, and on the
# addresses after it. NODES=1 makes it one sheep alone, with one copy.
set -euo pipefail
export PATH=$PWD/bin:/usr/bin:/bin:/usr/sbin:/sbin:$PATH LC_ALL=C.UTF-8

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() { printf '  $ %s\n' "$*"; "$@"; }
die() { echo "demo: $*" >&2; exit 1; }

address=${ADDRESS:-127.0.0.1}
nodes=${NODES:-3}
[[ $nodes =~ ^[1-9]$ ]] || die "NODES=$nodes makes no sense: take 1 to 9"
[[ $address =~ ^(.*\.)([0-9]+)$ ]] || die "ADDRESS=$address is not an IPv4 address like 127.0.0.5"
network=${BASH_REMATCH[1]} first=${BASH_REMATCH[2]}
[ $((first + nodes - 1)) -le 254 ] || die "there are no $nodes addresses from $address on"
copies=$((nodes < 3 ? nodes : 3))

work=$(mktemp -d "${TMPDIR:-/var/tmp}/sheepdog-demo.XXXXXX")
data=${DATA:-$work/data}
sheep=() fuse='' writer=''
cleanup() {
	local status=$? pid
	trap - EXIT INT TERM
	unmount
	[ -z "$writer" ] || kill "$writer" 2>/dev/null || true
	for pid in "${sheep[@]}"; do kill "$pid" 2>/dev/null || true; done
	for pid in "${sheep[@]}"; do wait "$pid" 2>/dev/null || true; done
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

host() { echo "$network$((first + $1 - 1))"; } # of node 1, 2, …
# launch N: start node N
launch() {
	mkdir -p "$data/n$1"
	local join=() i
	for i in $(seq "$nodes"); do join+=(--join "$(host "$i")"); done
	echo "  \$ sheep --name n$1 --address $(host "$1") --disk $data/n$1 --secret-file $data/secret --join …"
	sheep --name "n$1" --address "$(host "$1")" --disk "$data/n$1" --secret-file "$data/secret" "${join[@]}" >>"$work/n$1.log" 2>&1 &
	sheep[$1]=$!
}
alive() { kill -0 "${sheep[$1]}" 2>/dev/null || { tail -20 "$work/n$1.log" >&2; die "sheep n$1 ended"; }; }
# until_true SECONDS WHAT COMMAND...: wait until a command succeeds
until_true() {
	local end=$((SECONDS + $1)) what=$2
	shift 2
	until "$@"; do
		[ $SECONDS -lt "$end" ] || { tail -n 20 "$work"/n*.log >&2; die "$what did not come true in time"; }
		sleep 0.1
	done
}
dog() { command dog -a "$address:7003" --timeout 60s "$@"; }
answers() { alive "$1" && command dog -a "$(host "$1"):7003" --timeout 2s version >/dev/null && (exec 3<>"/dev/tcp/$(host "$1")/10809") 2>/dev/null; }
count_up() { dog -r node list 2>/dev/null | cut -d' ' -f5 | grep -c '^up$' || true; } # the fifth column is the state
all_up() { [ "$(count_up)" = "$nodes" ]; }
one_down() { [ "$(count_up)" = $((nodes - 1)) ]; }
whole() { dog -o json cluster info 2>/dev/null | python3 -c 'import json,sys; c=json.load(sys.stdin); sys.exit(c["status"]!="ok" or any(p["degraded"]+p["recovering"] for p in c["policies"]))'; }

for i in $(seq "$nodes"); do
	for port in 7001 7002 7003 10809; do # another sheep's volumes are not ours to write to
		if (exec 3<>"/dev/tcp/$(host "$i")/$port") 2>/dev/null; then
			die "something listens on $(host "$i"):$port already; another address will do: make demo ADDRESS=127.0.0.$((first + nodes + 10))"
		fi
	done
done
mkdir -p "$data"
if [ "$nodes" = 1 ]; then
	say "1. A sheep: a cluster of one node, formatted, on $address alone"
	echo "  \$ sheep --standalone --data $data"
	SHEEP_NODE_ADDRESS=$address sheep --standalone --data "$data" >"$work/n1.log" 2>&1 &
	sheep[1]=$!
	until_true 20 "that the sheep answers" answers 1
else
	say "1. $nodes sheep, which find each other and keep $copies copies"
	[ -s "$data/secret" ] || (umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$data/secret")
	for i in $(seq "$nodes"); do launch "$i"; done
	for i in $(seq "$nodes"); do until_true 30 "that n$i answers" answers "$i"; done
	if dog -r cluster info | grep -q '^unformatted'; then
		show dog cluster format -c "$copies"
	fi
	until_true 60 "that all nodes are up" all_up
	until_true 60 "that the cluster is whole" whole
fi
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
if dog vdi info vm1 >/dev/null 2>&1; then die "there is a volume vm1 in $data already"; fi
# written: bytes that the volume's clients have written so far
written() { dog -r session list | awk '$4 == "vm1" { n += $11 } END { print n + 0 }'; }
under_way() { ! kill -0 "$writer" 2>/dev/null || [ "$(written)" -gt $((32 << 20)) ]; }
if [ "$nodes" -lt 3 ]; then
	say "3. Onto volume vm1, over NBD"
	show dog vdi create vm1 "$size"
	progress=''
	if [ -t 1 ]; then progress=-p; fi
	show qemu-img convert -n $progress -f raw -O raw "$raw" "$uri"
else
	say "3. Onto volume vm1, over NBD; n$nodes is killed meanwhile"
	show dog vdi create vm1 "$size"
	echo "  \$ qemu-img convert -n -f raw -O raw $raw $uri &"
	qemu-img convert -n -r 64M -f raw -O raw "$raw" "$uri" & # slowly enough to have something happen to it
	writer=$!
	until_true 60 "that the copy is under way" under_way
	kill -0 "$writer" 2>/dev/null && echo "  ($(($(written) >> 20)) MiB are written)"
	echo "  \$ kill -9 ${sheep[$nodes]}    # n$nodes"
	kill -9 "${sheep[$nodes]}"
	wait "${sheep[$nodes]}" 2>/dev/null || true
	until_true 30 "that the others notice" one_down
	show dog node list
	wait "$writer" || die "qemu-img failed"
	writer=''
	echo "  qemu-img has noticed nothing: the copy is complete"
	show dog cluster info

	say "4. n$nodes comes back, and gets what it has missed"
	began=$(date +%s%N)
	launch "$nodes"
	until_true 30 "that n$nodes answers" answers "$nodes"
	until_true 60 "that all nodes are up" all_up
	show dog node recovery
	show dog node recovery --wait
	until_true 120 "that the cluster is whole" whole
	echo "  whole again after $((($(date +%s%N) - began) / 1000000)) ms"
	show dog node list
fi

say "5. A snapshot, which is an export of its own"
show dog vdi snapshot vm1 -s first
show dog vdi list
show nbdinfo --list "nbd://$address" | grep -E 'export=|export-size' || true

other=nbd://$(host "$nodes")/vm1
say "6. Compared bit for bit, over NBD: the volume, through $(host "$nodes") too, the snapshot, and the way back out"
show qemu-img compare -f raw -F raw "$raw" "$uri"
if [ "$other" != "$uri" ]; then show qemu-img compare -f raw -F raw "$raw" "$other"; fi
show qemu-img compare -f raw -F raw "$raw" "$uri@first"
show nbdcopy "$uri" "$work/back.raw"
show cmp "$raw" "$work/back.raw"
rm -f "$work/back.raw"

say "7. The file system, checked through the export"
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
show dog cluster check

say "All of it is as it should be. Use it:"
cat <<USE
  qemu-system-x86_64 -drive file=$uri,format=raw,if=virtio …
  nbd-client $address -N vm1 /dev/nbd0
  nbdinfo --list nbd://$address          qemu-img info $uri@first
  bin/dog -a $address:7003 node list     http://$address:7003/
USE
[ -z "${EXIT:-}" ] || exit 0
say "Up until Ctrl-C."
wait "${sheep[1]}"
