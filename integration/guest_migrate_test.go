package integration

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// movingScript writes and reads back all the time, with checksums, while the machine moves from drive to drive.
const movingScript = `
cat >/tmp/io.sh <<'X'
n=0
while [ ! -e /tmp/stop ]; do
	n=$((n + 1))
	fio --name=io --filename=/mnt/io --size=4M --bs=4k --rw=randwrite --number_ios=200 --ioengine=libaio --iodepth=8 --direct=1 --verify=crc32c --randseed=$n >/tmp/fio 2>&1 || { cat /tmp/fio; exit 1; }
	echo $n >/mnt/rounds
done
X
mkfs.ext4 -q /dev/vda
mount -t ext4 /dev/vda /mnt
dd if=/dev/urandom of=/mnt/f bs=1M count=8 conv=fsync 2>/dev/null
sha256sum </mnt/f >/tmp/sum
sh /tmp/io.sh & io=$!
for i in $(seq $MOVES); do
	sleep 1
	echo "MOVE $i"
	read -r answer </dev/console
	echo "moved: $answer, after round $(cat /mnt/rounds)"
done
sleep 1
touch /tmp/stop
wait $io
echo 3 >/proc/sys/vm/drop_caches
sha256sum </mnt/f | cmp - /tmp/sum
umount /mnt
e2fsck -fn /dev/vda
sync
dd if=/dev/vda bs=1M iflag=direct 2>/dev/null | sha256sum | sed 's/^/SUM /'
`

// A guest that runs is moved from one QEMU to another, with writes under way, and the volume from frontend to frontend
// and from gateway to gateway with it: iSCSI by QEMU's own initiator, NBD, and the native protocol by tgt.
func TestGuestMigrates(t *testing.T) {
	if !soaking() {
		t.Skip("moves a guest seven times: make soak")
	}
	rig.Need(t, "tgtd", "tgtadm")
	f := rig.NewFlock(t, 3, 3)
	g := rig.NewGuest(t)
	f.Nodes[0].Dog("vdi", "create", "vm1", "64M")
	f.Know("vm1")
	native := func(number int, s *rig.Sheep) string {
		return startTgtd(t, number).serve("tcp:" + s.Native() + ":vm1")
	}
	steps := []struct{ what, url string }{
		{"iSCSI", f.Nodes[0].ISCSI("vm1")},
		{"iSCSI, another gateway", f.Nodes[1].ISCSI("vm1")},
		{"NBD", f.Nodes[2].URI("vm1")},
		{"NBD, another gateway", f.Nodes[0].URI("vm1")},
		{"native", native(91, f.Nodes[1])},
		{"native, another gateway", native(92, f.Nodes[2])},
		{"iSCSI again", f.Nodes[2].ISCSI("vm1")},
		{"iSCSI, same gateway", f.Nodes[2].ISCSI("vm1")},
	}
	drive := func(url string) []string {
		return []string{"-drive", "file=" + url + ",format=raw,if=virtio,cache=none"}
	}
	m := g.Start(nil, fmt.Sprintf("MOVES=%d\n", len(steps)-1)+movingScript, drive(steps[0].url)...)
	for i, s := range steps[1:] {
		m.Await(5*time.Minute, fmt.Sprintf("\nMOVE %d\n", i+1))
		began := time.Now()
		m = m.Migrate(3*time.Minute, drive(s.url)...)
		t.Logf("to %s in %v", s.what, time.Since(began).Round(time.Millisecond))
		m.Tell(s.what)
	}
	out := m.Wait(5 * time.Minute)
	if testing.Verbose() {
		t.Log(out)
	}
	_, sum, _ := strings.Cut(out, "\nSUM ")
	want, _, _ := strings.Cut(sum, " ")
	if len(want) != 64 {
		t.Fatalf("the guest tells no checksum\n%s", out)
	}
	for i, s := range f.Nodes {
		for _, url := range []string{s.URI("vm1"), s.ISCSI("vm1")} {
			if got := rig.ImageSum(t, url); got != want {
				t.Errorf("through node %d, %s has the checksum %s, the guest saw %s", i+1, url, got, want)
			}
		}
		noPanic(t, s)
	}
}
