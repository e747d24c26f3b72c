# NBD: one connection, then four; the file system stays whole.
modprobe nbd max_part=0
nbd-client $N1 -N vm1 /dev/nbd0 -b 512
mkfs.ext4 -q /dev/nbd0
mount /dev/nbd0 /mnt
for i in 1 2 3 4; do dd if=/dev/urandom of=/mnt/f$i bs=1M count=6 2>/dev/null; done
sync
cat /mnt/f1 /mnt/f2 /mnt/f3 | sha256sum >/tmp/sum
gives_back vm1 5 /mnt/f4
umount /mnt
e2fsck -fn /dev/nbd0
nbd-client -d /dev/nbd0

nbd-client $N2 -N vm1 -C 4 /dev/nbd1 -b 512
mount /dev/nbd1 /mnt
dd if=/dev/urandom of=/mnt/f4 bs=1M count=6 conv=fsync 2>/dev/null
for i in 1 2 3 4; do dd if=/dev/urandom of=/mnt/g$i bs=64k count=40 2>/dev/null & done
wait
cat /mnt/f1 /mnt/f2 /mnt/f3 | sha256sum | cmp - /tmp/sum
sync
echo 3 >/proc/sys/vm/drop_caches
cat /mnt/g* | sha256sum >/tmp/a
umount /mnt
e2fsck -fn /dev/nbd1
mount -o ro /dev/nbd1 /mnt
cat /mnt/g* | sha256sum >/tmp/b
cmp /tmp/a /tmp/b
umount /mnt
nbd-client -d /dev/nbd1
