package rig

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

// OwnMounts runs this test process once more, in a mount namespace of its own, and returns how it ended:
// what tests mount, and the loop devices below, are gone with it however it ends. It reports false if it
// is that process already, or if it may not have such a namespace; tests that mount say so then.
func OwnMounts() (code int, ran bool) {
	const mark = "SHEEP_OWN_MOUNTS"
	if os.Getenv(mark) != "" {
		// What is unmounted here is so in the namespaces of other tests' nodes, too. Else a file system whose power
		// was cut would live on there, and come back as it was.
		if err := syscall.Mount("none", "/", "", syscall.MS_REC|syscall.MS_SHARED, ""); err != nil {
			fmt.Fprintln(os.Stderr, "mounts are not shared with the namespaces of nodes:", err)
			return 2, true
		}
		return 0, false
	}
	runtime.LockOSThread() // the death of a thread counts as that of the parent
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), mark+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if cmd.Start() != nil {
		return 0, false
	}
	var exit *exec.ExitError
	switch err := cmd.Wait(); {
	case err == nil:
		return 0, true
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		return exit.ExitCode(), true
	}
	return 2, true
}

// PowerDisk is an ext4 file system on a loop device whose power can be cut.
type PowerDisk struct {
	Dir string

	t      testing.TB
	device string
}

// NewPowerDisk makes a file system of a size for the time of the test. It needs root and a loop device.
func NewPowerDisk(t testing.TB, size string) *PowerDisk {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	d := &PowerDisk{t: t, Dir: t.TempDir()}
	OK(t, "truncate", "-s", size, image)
	OK(t, "mkfs.ext4", "-q", "-m", "0", image)
	if r := Run(t, 10*time.Second, "", "mount", "-o", "loop", image, d.Dir); r.Code != 0 {
		t.Fatalf("this test cuts the power of file systems on loop devices, and needs root and such devices: %s", r.Stderr)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(d.Dir, syscall.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) { // EINVAL: it is not mounted
			t.Errorf("unmount %s: %v", d.Dir, err)
		}
	})
	d.device = strings.TrimSpace(OK(t, "findmnt", "-n", "-o", "SOURCE", d.Dir))
	// mount has the device detach itself when nobody uses it: as long as it is open here it stays.
	hold, err := os.Open(d.device)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { hold.Close() })
	if err := os.Remove(filepath.Join(d.Dir, "lost+found")); err != nil {
		t.Error(err)
	}
	return d
}

const (
	extShutdown       = 0x8004587d // EXT4_IOC_SHUTDOWN
	writeBack         = 1 | 2 | 4  // of sync_file_range(2): wait for what is under way, write, wait
	shutdownJournal   = 1          // what the running transaction has is written first
	shutdownNoJournal = 2
)

// CutPower ends all daemons with SIGKILL and loses what their disks have not written: the page cache of
// each is thrown away by the file system itself, as a power cut does it, and the journal is replayed.
// Some stretches of what is not synced, drawn by chance, reach the disk before, as they may: so of a
// log's end that nobody has synced anything may be missing. Whether what the journal has not committed
// yet is there is drawn, too. Nothing that was synced is touched.
func (f *Flock) CutPower(random *rand.Rand, disks []*PowerDisk) {
	f.t.Helper()
	for _, s := range f.Nodes {
		s.cmd.Process.Kill()
	}
	for _, d := range disks {
		if random.IntN(2) == 0 {
			d.writeSome(random)
		}
		d.shutdown(random)
	}
	for _, s := range f.Nodes {
		<-s.exited
	}
	for _, d := range disks {
		d.restart()
	}
}

// writeSome brings some of what is dirty to the disk.
func (d *PowerDisk) writeSome(random *rand.Rand) {
	d.t.Helper()
	const page, most = 4096, 16
	err := filepath.WalkDir(d.Dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || random.IntN(4) == 0 {
			return err
		}
		file, err := os.Open(path)
		if err != nil {
			return err
		}
		defer file.Close()
		info, err := file.Stat()
		if err != nil {
			return err
		}
		for off := int64(0); off < info.Size(); {
			n := int64(1+random.IntN(most)) * page
			if err := syscall.SyncFileRange(int(file.Fd()), off, n, writeBack); err != nil {
				return err
			}
			off += n + int64(random.IntN(most))*page
		}
		return nil
	})
	if err != nil {
		d.t.Fatalf("write back a part of %s: %v", d.Dir, err)
	}
}

// shutdown has the file system forget what is not on the disk.
func (d *PowerDisk) shutdown(random *rand.Rand) {
	d.t.Helper()
	root, err := os.Open(d.Dir)
	if err != nil {
		d.t.Fatal(err)
	}
	defer root.Close()
	how := [...]uint32{shutdownJournal, shutdownNoJournal}[random.IntN(2)]
	if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, root.Fd(), extShutdown, uintptr(unsafe.Pointer(&how))); e != 0 {
		d.t.Fatalf("the file system at %s cannot be shut down (needs root and Linux 4.11): %v", d.Dir, e)
	}
}

// restart mounts what is on the disk.
func (d *PowerDisk) restart() {
	d.t.Helper()
	OK(d.t, "umount", d.Dir)
	OK(d.t, "mount", d.device, d.Dir)
}
