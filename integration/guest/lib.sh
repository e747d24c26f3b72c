# What scripts in the guest use. HOST_PORT is where the test listens.

# host NAME ARG…: has the test do something, shows what came of it, and fails if that failed.
host() { busybox wget -q -O - "http://10.0.2.2:$HOST_PORT/$(echo "$*" | tr ' ' '/')"; }

say() { echo "== $(cut -d ' ' -f 1 /proc/uptime) $*"; }

# within SECONDS COMMAND…: until it succeeds.
within() {
	end=$(($(cut -d . -f 1 /proc/uptime) + $1))
	shift
	until "$@"; do
		[ "$(cut -d . -f 1 /proc/uptime)" -lt "$end" ] || { echo "in time, this did not succeed: $*"; return 1; }
		sleep 0.2
	done
}

start_iscsid() {
	modprobe -a iscsi_tcp sd_mod sg
	iscsid
	within 60 sh -c 'iscsiadm -m session >/dev/null 2>&1; [ $? -ne 20 ]'
}

start_multipathd() {
	modprobe -a dm-multipath dm-service-time scsi_dh_alua
	/lib/systemd/systemd-udevd --daemon
	udevadm trigger --type=subsystems --action=add
	udevadm trigger --type=devices --action=add
	multipathd
	within 60 sh -c 'multipathd show daemon >/dev/null 2>&1'
}

# disks [TARGET]: the names of the disks of iSCSI sessions.
disks() {
	for s in /sys/class/iscsi_session/session*; do
		[ -z "$1" ] || [ "$(cat "$s/targetname")" = "$1" ] || continue
		for b in "$s"/device/target*/*:*/block/*; do [ ! -e "$b" ] || echo "${b##*/}"; done
	done
}

has_disks() { [ "$(disks "$2" | wc -l)" = "$1" ]; }

# login TARGET N ARG…: logs in as iscsiadm is told and waits until the target has N disks.
login() {
	target=$1 n=$2
	shift 2
	iscsiadm -m node -T "$target" "$@" -l >/dev/null
	within 60 has_disks "$n" "$target"
}

# fails COMMAND…: it must.
fails() {
	if "$@"; then
		echo "this must fail: $*"
		return 1
	fi
}

# gives_back VDI MIB FILE: removing the file and trimming its file system frees so much of the VDI's space.
gives_back() {
	before=$(host used "$1")
	rm "$3"
	sync
	fstrim -v "${3%/*}"
	after=$(host used "$1")
	echo "space used: $before MiB, after fstrim $after MiB"
	[ $((before - after)) -ge "$2" ]
}
