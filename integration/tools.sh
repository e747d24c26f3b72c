#!/usr/bin/env bash
# Installs from Debian what the end-to-end tests, the demo and the benchmarks use, and says what is there.
# Nothing is done when all is there already.
set -euo pipefail

packages=(
	gcc libc6-dev                      # go test -race
	libnbd-bin python3 python3-libnbd  # nbdinfo, nbdcopy, nbdfuse, nbdsh
	nbd-client                         # nbd-client -l
	qemu-utils                         # qemu-img, qemu-io, qemu-nbd
	qemu-block-extra libiscsi-bin      # iscsi:// in QEMU; iscsi-ls, iscsi-inq, iscsi-test-cu
	nbdkit fio                         # the peers' benchmark, fio's NBD engine
	iproute2 nftables                  # networks that tests cut
	e2fsprogs util-linux mount         # mkfs.ext4, e2fsck, loop devices
	tgt libiscsi-bin qemu-block-extra  # tgtd over the native protocol, libiscsi's tests
	qemu-system-x86 seabios cpio kmod  # a guest with the kernel's own clients
)

missing=()
for p in "${packages[@]}"; do
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)" = installed ] || missing+=("$p")
done

as_root=()
if [ "$(id -u)" != 0 ]; then
	command -v sudo >/dev/null || { echo "tools: not root and no sudo: install ${missing[*]}" >&2; exit 1; }
	as_root=(sudo)
fi
if [ ${#missing[@]} -gt 0 ]; then
	echo "tools: installing ${missing[*]}"
	log=$(mktemp)
	trap 'rm -f "$log"' EXIT
	{ "${as_root[@]}" apt-get -q update &&
		"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends "${missing[@]}"
	} >"$log" 2>&1 || { cat "$log" >&2; echo "tools: apt-get failed, see above" >&2; exit 1; }
fi

export PATH=/usr/bin:/bin:/usr/sbin:/sbin:$PATH
bad=0
have() { # have NAME COMMAND...: the tool answers
	local name=$1 line
	shift
	if line=$("$@" 2>&1) && [ -n "$line" ]; then printf '  %-20s %s\n' "$name" "${line%%$'\n'*}"
	else echo "tools: $name does not run: $*" >&2; bad=1; fi
}
echo "tools:"
have nbdinfo nbdinfo --version
have nbdcopy nbdcopy --version
have nbdsh nbdsh -c 'print("libnbd " + h.get_version())'
have nbdfuse nbdfuse --version
have nbd-client nbd-client --version
have qemu-img qemu-img --version
have iscsi-ls iscsi-ls --help
have iscsi-test-cu iscsi-test-cu --help
have qemu-system-x86_64 qemu-system-x86_64 --version
have nbdkit nbdkit --version
have fio fio --version
have e2fsck e2fsck -V
have ip ip -V
have nft nft --version
have gcc gcc --version
fio --enghelp 2>/dev/null | grep -qw nbd || { echo "tools: this fio has no nbd engine" >&2; bad=1; }
exit $bad
