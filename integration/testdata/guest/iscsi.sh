# iSCSI: who does not know the secret gets nothing; discovery tells all gateways.
start_iscsid
fails iscsiadm -m discovery -t st -p $N1
cat >>/etc/iscsi/iscsid.conf <<X
node.startup = manual
discovery.sendtargets.auth.authmethod = CHAP
discovery.sendtargets.auth.username = joe
discovery.sendtargets.auth.password = correct-horse-battery
discovery.sendtargets.auth.username_in = target
discovery.sendtargets.auth.password_in = staple-staple-staple
node.session.auth.authmethod = CHAP
node.session.auth.username = joe
node.session.auth.password = correct-horse-battery
node.session.auth.username_in = target
node.session.auth.password_in = staple-staple-staple
node.session.timeo.replacement_timeout = 60
node.conn[0].timeo.noop_out_interval = 2
node.conn[0].timeo.noop_out_timeout = 2
node.conn[0].iscsi.HeaderDigest = CRC32C
node.conn[0].iscsi.DataDigest = CRC32C
X
iscsiadm -m discovery -t st -p $N1 >/tmp/portals
for n in $N1 $N2 $N3; do grep -q "^$n:3260,[0-9]* $IQN:vm1\$" /tmp/portals; done

# The volume has what NBD wrote. Digests are used; FUA, and trimming by 4 KiB, are known.
login $IQN:vm1 1 -p $N1
iscsiadm -m session -P 2 >/tmp/session
grep -q 'HeaderDigest: CRC32C' /tmp/session
grep -q 'DataDigest: CRC32C' /tmp/session
disk=$(disks $IQN:vm1)
queue=/sys/block/$disk/queue
[ "$(cat $queue/fua)" = 1 ]
[ "$(cat $queue/discard_granularity)" = 4096 ]
[ "$(cat $queue/logical_block_size)-$(cat $queue/physical_block_size)" = 512-4096 ]
[ "$(cat $queue/write_zeroes_max_bytes)" -gt 0 ]
mount -t ext4 /dev/$disk /mnt
cat /mnt/f1 /mnt/f2 /mnt/f3 | sha256sum | cmp - /tmp/sum
cat /mnt/g* | sha256sum | cmp - /tmp/a
fio --name=verify --filename=/mnt/v --size=8M --bs=4k --rw=randwrite --number_ios=300 --ioengine=libaio --iodepth=16 --direct=1 --verify=crc32c >/tmp/fio || { cat /tmp/fio; false; }
gives_back vm1 5 /mnt/f4

# A new size is told by itself, and seen when it is asked for.
dmesg -c >/dev/null
host dog vdi resize vm1 160M
told() { dd if=/dev/$disk of=/dev/null bs=4k count=1 skip=1000 iflag=direct 2>/dev/null; dmesg | grep -q 'Capacity data has changed'; }
within 60 told
iscsiadm -m session -R >/dev/null
[ "$(blockdev --getsize64 /dev/$disk)" = $((160 << 20)) ]
resize2fs /dev/$disk

# The gateway is killed, and stopped, and started again: what was begun is done.
dd if=/dev/urandom of=/mnt/big bs=1M count=8 conv=fsync 2>/dev/null &
host kill 1
host start 1
wait $!
sha256sum </mnt/big >/tmp/big
dd if=/dev/urandom of=/mnt/big2 bs=1M count=4 conv=fsync 2>/dev/null &
host stop 1
host start 1
wait $!
umount /mnt
e2fsck -fn /dev/$disk
mount -t ext4 -o ro /dev/$disk /mnt
sha256sum </mnt/big | cmp - /tmp/big
umount /mnt
iscsiadm -m node -u >/dev/null
has_disks 0
host whole

# Two initiators, through two gateways. What one writes the other reads.
cat >/etc/iscsi/ifaces/second <<X
iface.iscsi_ifacename = second
iface.initiatorname = iqn.1993-08.org.debian:01:second
iface.transport_name = tcp
X
iscsiadm -m discovery -t st -p $N2 -I second >/dev/null
login $IQN:vm2 1 -p $N1 -I default
a=/dev/$(disks $IQN:vm2)
login $IQN:vm2 2 -p $N2 -I second
b=/dev/$(disks $IQN:vm2 | grep -v "^${a#/dev/}\$")
dd if=/dev/urandom of=/tmp/x bs=4k count=8 2>/dev/null
dd if=/tmp/x of=$a bs=4k oflag=direct 2>/dev/null
dd if=$b bs=4k count=8 iflag=direct 2>/dev/null | cmp - /tmp/x
# Commands are told first of what others did (status 6: unit attention): who asks asks again.
persist() {
	for try in 1 2 3 4; do
		sg_persist "$@" >/tmp/pr 2>&1 && return
		[ $? = 6 ] || break
	done
	cat /tmp/pr
	return 1
}
reserve() { persist --out "$@"; }
writes() { dd if=/tmp/x of=$1 bs=4k count=1 oflag=direct 2>/dev/null; }
shows() { persist --in $1 $2 && grep -q "$3" /tmp/pr; }
shows -k $a 'NO registered'
reserve -G --param-sark=0xa $a
within 30 reserve -G --param-sark=0xb $b
shows -k $a '2 registered'
reserve -R --param-rk=0xa --prout-type=5 $a
within 30 shows -r $b 'Write Exclusive, registrants only'
writes $a
writes $b
reserve -G --param-rk=0xb --param-sark=0 $b
fails writes $b
writes $a
reserve -G --param-sark=0xb $b
reserve -P --param-rk=0xb --param-sark=0xa --prout-type=1 $b
within 30 shows -k $a '1 registered'
shows -r $a 'Write Exclusive$'
fails writes $a
writes $b
reserve -C --param-rk=0xb $b
within 30 shows -k $a 'NO registered'
within 30 writes $a
iscsiadm -m node -u >/dev/null
