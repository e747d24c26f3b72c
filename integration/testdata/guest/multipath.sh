# Two gateways are two paths of one disk.
cat >/etc/multipath.conf <<X
defaults {
	find_multipaths no
	user_friendly_names yes
	polling_interval 1
	max_polling_interval 2
}
blacklist {
	devnode "^(ram|loop|fd|vd|nbd)"
}
devices {
	device {
		vendor "SHEEPDOG"
		product "VDI"
		path_grouping_policy group_by_prio
		prio alua
		path_checker tur
		hardware_handler "1 alua"
		failback immediate
		no_path_retry 30
	}
}
X
start_multipathd
iscsiadm -m node -o update -n node.session.timeo.replacement_timeout -v 2
iscsiadm -m node -T $IQN:mp -p $N1 -I default -l >/dev/null
login $IQN:mp 2 -p $N2 -I default
mp=/dev/mapper/mpatha
paths() { multipathd show paths raw format '%m %t %o %p %g'; }
has_paths() { [ "$(paths | grep -c '^mpatha active')" = $1 ]; }
has_prios() { [ "$(multipathd show paths raw format '%m %p' | awk '$1 == "mpatha" {print $2}' | sort -n | tr '\n' ' ')" = "$1 " ]; }
within 60 has_paths 2
within 60 test -b $mp
# Who writes owns the volume; its path is the better one.
dd if=/dev/zero of=$mp bs=4k count=1 oflag=direct 2>/dev/null
within 60 has_prios "10 50"
multipath -ll

# fill BYTE: 64 blocks of it, four writes at a time.
fill() {
	yes "$1" | tr -d '\n' | head -c 65536 >/tmp/fill.$1
	for at in 0 1 2 3; do
		dd if=/tmp/fill.$1 of=$mp bs=4k count=16 seek=$((2048 + 16 * at)) oflag=direct conv=notrunc 2>/dev/null & eval "fill$at=$!"
	done
	wait $fill0 && wait $fill1 && wait $fill2 && wait $fill3
}
filled() {
	for at in 0 1 2 3; do dd if=$mp bs=4k count=16 skip=$((2048 + 16 * at)) iflag=direct 2>/dev/null | cmp - /tmp/fill.$1 || return 1; done
}
load() { fio --name=load --filename=$mp --offset=1M --size=1M --bs=4k --rw=randwrite --time_based --runtime=$1 --ioengine=libaio --iodepth=16 --direct=1 --verify=crc32c >/tmp/load 2>&1; }

# The active gateway hangs with writes in flight. They are done through the other one, and others after them; when it goes
# on, nothing of what it has in hand lands on top of those.
fill 1
filled 1
owner=$(host owner mp)
host freeze $owner
fill 22
fill 33
host thaw $owner
filled 33
within 60 has_paths 2
filled 33
host whole
filled 33

# The active gateway is killed, and comes back.
load 6 &
sleep 1
owner=$(host owner mp)
host kill $owner
wait $! || { cat /tmp/load; false; }
host start $owner
within 60 has_paths 2
host whole

filled 33
multipath -ll
