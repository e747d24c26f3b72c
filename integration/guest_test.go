package integration

import (
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// The kernel's own NBD client in a real Linux guest: a file system is made, filled, trimmed, checked and
// found again, over one connection and over four.
func TestKernelClient(t *testing.T) {
	rig.Need(t, "qemu-system-x86_64", "cpio", "nbd-client", "depmod")
	dir, err := filepath.Abs("../.cache/guest")
	if err != nil {
		t.Fatal(err)
	}
	if r := rig.Run(t, 5*time.Minute, "", mustAbs(t, "guest/build.sh"), dir); r.Code != 0 {
		t.Fatalf("build the guest: status %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm1", "512M")
	script := rig.File(t, "test.sh", []byte(`set -ex
P=`+strconv.Itoa(s.NBDPort)+`
nbd-client 10.0.2.2 $P -N vm1 /dev/nbd0 -b 512
mkfs.ext4 -q /dev/nbd0
mount /dev/nbd0 /mnt
for i in 1 2 3 4; do dd if=/dev/urandom of=/mnt/f$i bs=1M count=6 2>/dev/null; done
sync
cat /mnt/f1 /mnt/f2 /mnt/f3 | sha256sum >/tmp/sum
rm /mnt/f4
sync
fstrim -v /mnt
umount /mnt
e2fsck -fn /dev/nbd0
nbd-client -d /dev/nbd0

nbd-client 10.0.2.2 $P -N vm1 -C 4 /dev/nbd1 -b 512
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
echo ALL-DONE
`))
	r := rig.Run(t, 4*time.Minute, "", mustAbs(t, "guest/run.sh"), dir, script)
	if r.Code != 0 || !strings.Contains(r.Stdout, "ALL-DONE") {
		t.Fatalf("guest: status %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	noPanic(t, s)
}

func mustAbs(t *testing.T, path string) string {
	t.Helper()
	abs, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return abs
}
