package integration

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// tgtd is Debian's iSCSI target with its sheepdog backing store: a client of the native protocol that we
// did not write.
type tgtd struct {
	t       *testing.T
	cmd     *exec.Cmd
	address string // of its portal
	control string
	env     []string
}

const tgtName = "iqn.2026-11.test:vm"

func startTgtd(t *testing.T, number int) *tgtd {
	t.Helper()
	l, err := net.Listen("tcp", rig.Address+":0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	dir, err := os.MkdirTemp("", "tgt-") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	g := &tgtd{t: t, address: address, control: fmt.Sprint(number), env: append(os.Environ(), "TGT_IPC_SOCKET="+filepath.Join(dir, "ipc"))}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	g.cmd = exec.Command("tgtd", "-f", "-C", g.control, "--iscsi", "portal="+address)
	g.cmd.Env, g.cmd.Stdout, g.cmd.Stderr = g.env, log, log
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.kill)
	return g
}

func (g *tgtd) kill() {
	g.cmd.Process.Kill()
	g.cmd.Wait()
}

// serve exports a VDI, which is named as in unix:PATH:NAME or tcp:HOST:PORT:NAME, and returns where it is found.
// tgt cuts off the port behind its fourth digit.
func (g *tgtd) serve(store string) string {
	g.t.Helper()
	g.admin("--op", "new", "--mode", "target", "--tid", "1", "-T", tgtName)
	g.admin("--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "--bstype", "sheepdog", "--backing-store", store)
	g.admin("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")
	return "iscsi://" + g.address + "/" + tgtName + "/1"
}

// admin runs tgtadm, until tgtd listens.
func (g *tgtd) admin(args ...string) {
	g.t.Helper()
	var out []byte
	var err error
	for end := time.Now().Add(endLimit); time.Now().Before(end); {
		cmd := exec.Command("tgtadm", append([]string{"-C", g.control, "--lld", "iscsi"}, args...)...)
		cmd.Env = g.env
		if out, err = cmd.CombinedOutput(); err == nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	g.t.Fatalf("tgtadm %v: %v: %s", args, err, out)
}

// qemuIO runs commands of qemu-io, each of which must find what it looks for.
func qemuIO(t *testing.T, uri string, commands ...string) {
	t.Helper()
	args := []string{"-f", "raw"}
	if strings.Contains(uri, "@") {
		args = append(args, "-r")
	}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out := rig.OK(t, "qemu-io", append(args, uri)...)
	if strings.Contains(out, "failed") || strings.Contains(out, "rror") {
		t.Fatalf("qemu-io %v: %s", commands, out)
	}
}

// libiscsi's tests of reading, writing and flushing through tgt, and what they leave is the same over NBD.
func TestNativeTgt(t *testing.T) {
	besideOthers(t)
	rig.Need(t, "tgtd", "tgtadm", "iscsi-test-cu", "qemu-io", "qemu-img")
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm", "64M")
	uri := startTgtd(t, 101).serve("unix:" + s.NativeUnix + ":vm")
	for _, suite := range []string{"Read10", "Read16", "Write10", "Write16", "ReadCapacity16"} {
		out := rig.OK(t, "iscsi-test-cu", "-d", "-t", "SCSI."+suite, uri)
		if strings.Contains(out, "[FAILED]") {
			t.Errorf("%s: %s", suite, out)
		}
	}
	// All of it is written: tgt answers a read that begins in data and ends in a hole with rubbish, whatever it is told.
	img := rig.File(t, "img", rig.Random(5, 64<<20))
	rig.OK(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", img, uri)
	qemuIO(t, uri, "write -P 0x5a 50M 5M", "flush", "read -P 0x5a 50M 5M")
	rig.OK(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri, s.URI("vm"))

	// A snapshot behind its back, and the sheep killed under it.
	s.Dog("vdi", "snapshot", "vm", "-s", "one")
	qemuIO(t, uri, "write -P 0x6b 50M 64k", "read -P 0x6b 50M 64k", "read -P 0x5a 51M 1M")
	qemuIO(t, s.URI("vm@one"), "read -P 0x5a 50M 5M")
	qemuIO(t, uri, "flush")
	s.Kill()
	s.Start()
	qemuIO(t, uri, "write -P 0x7c 51M 64k", "read -P 0x7c 51M 64k", "read -P 0x6b 50M 64k")
	rig.OK(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri, s.URI("vm"))
	rig.Contains(t, s.Dog("vdi", "check", "vm"), "as they should be")
}

// Two tgtd share a volume: what one writes the other reads, also where its own copy of the map has a hole or
// something older; and what NBD writes. One is killed, and the other goes on.
func TestNativeShared(t *testing.T) {
	besideOthers(t)
	rig.Need(t, "tgtd", "tgtadm", "qemu-io")
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm", "64M")
	gs := []*tgtd{startTgtd(t, 102), startTgtd(t, 103)}
	uris := []string{gs[0].serve("unix:" + s.NativeUnix + ":vm"), gs[1].serve("unix:" + s.NativeUnix + ":vm")}
	qemuIO(t, uris[1], "read -P 0 0 8M")
	for i := range 6 {
		qemuIO(t, uris[i%2], fmt.Sprintf("write -P %d %dM 1M", i+1, 4*i))
		qemuIO(t, uris[(i+1)%2], fmt.Sprintf("read -P %d %dM 1M", i+1, 4*i), fmt.Sprintf("read -P 0 %dM 1M", 4*i+1))
	}
	s.Dog("vdi", "snapshot", "vm", "-s", "one")
	qemuIO(t, uris[0], "write -P 0x77 0 64k")
	qemuIO(t, uris[1], "read -P 0x77 0 64k", "read -P 1 64k 64k")
	qemuIO(t, s.URI("vm"), "write -P 0x79 40M 4M")
	qemuIO(t, uris[0], "read -P 0x79 40M 4M")
	s.Kill() // from now on nobody remembers who has locked it
	s.Start()
	qemuIO(t, uris[1], "write -P 0x7a 48M 64k")
	qemuIO(t, uris[0], "read -P 0x7a 48M 64k", "read -P 0x79 40M 4M")
	gs[0].kill()
	qemuIO(t, uris[1], "write -P 0x7b 52M 64k", "read -P 0x7b 52M 64k", "read -P 0x77 0 64k")
	qemuIO(t, s.URI("vm"), "read -P 0x7b 52M 64k", "read -P 0x7a 48M 64k", "read -P 0x77 0 64k", "read -P 1 64k 64k")
}

// fioOverTgt runs fio's verification over what tgtd serves. This fio speaks no iSCSI, so qemu-nbd stands between. Meanwhile is
// called when it has begun; fio must take note of nothing.
func fioOverTgt(t *testing.T, uri, size string, meanwhile func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "fio-") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	nbd := exec.Command(rig.Tool("qemu-nbd"), "-t", "-f", "raw", "--cache=none", "-k", socket, uri)
	nbd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := nbd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		nbd.Process.Kill()
		nbd.Wait()
	}()
	for range 200 {
		if conn, err := net.Dial("unix", socket); err == nil {
			conn.Close()
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		meanwhile()
	}()
	rig.OK(t, "fio", "--name=v", "--ioengine=nbd", "--uri=nbd+unix:///?socket="+socket, "--rw=randwrite", "--bsrange=4k-64k", "--iodepth=8",
		"--size="+size, "--verify=crc32c", "--verify_fatal=1", "--verify_dump=0", "--verify_state_save=0", "--serialize_overlap=1", "--fsync=100")
	<-done
}

// tgt against three nodes: a tgtd at each of two shares the volume; fio verifies what it wrote while nodes are killed, the sheep
// that tgtd talks to among them; then a tgtd is killed. NBD has the same data, through the third.
func TestNativeTgtCluster(t *testing.T) {
	if !soaking() {
		t.Skip("takes a minute: make soak")
	}
	rig.Need(t, "tgtd", "tgtadm", "iscsi-test-cu", "qemu-io", "qemu-img", "qemu-nbd", "fio")
	f := rig.NewFlock(t, 3, 3)
	f.Nodes[0].Dog("vdi", "create", "vm", "32M")
	f.Know("vm")
	gs := []*tgtd{startTgtd(t, 104), startTgtd(t, 105)}
	var uris []string
	for i, g := range gs {
		uris = append(uris, g.serve("tcp:"+f.Nodes[i].Native()+":vm"))
	}
	for _, suite := range []string{"Read10", "Read16", "Write10", "Write16", "ReadCapacity16"} {
		if out := rig.OK(t, "iscsi-test-cu", "-d", "-t", "SCSI."+suite, uris[0]); strings.Contains(out, "[FAILED]") {
			t.Errorf("%s: %s", suite, out)
		}
	}
	img := rig.File(t, "img", rig.Random(6, 32<<20)) // no holes: see TestNativeTgt
	rig.OK(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", img, uris[1])
	same := func() {
		t.Helper()
		for _, uri := range uris {
			rig.OK(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri, f.Nodes[2].URI("vm"))
		}
	}
	same()
	fioOverTgt(t, uris[0], "32m", func() {
		time.Sleep(time.Second)
		f.Nodes[2].Kill()
		time.Sleep(time.Second)
		f.Nodes[2].Start()
		f.Nodes[0].Kill() // tgtd connects again every second
		f.Nodes[0].Start()
	})
	f.WaitWhole(wholeLimit)
	same()
	gs[0].kill()
	qemuIO(t, uris[1], "write -P 0x5c 8M 1M", "flush", "read -P 0x5c 8M 1M")
	uris = uris[1:]
	same()
	f.Nodes[1].Kill() // the sheep of the other one
	f.Nodes[1].Start()
	qemuIO(t, uris[0], "write -P 0x5d 9M 1M", "read -P 0x5c 8M 1M", "read -P 0x5d 9M 1M")
	same()
	rig.Contains(t, f.Nodes[2].Dog("vdi", "check", "vm"), "as they should be")
}
