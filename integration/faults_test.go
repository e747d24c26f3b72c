package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"sheepdog/integration/client"
	"sheepdog/integration/rig"
)

// A flipped bit in an object file: the read of that block fails with EIO, the log and dog name the object,
// and everything else goes on (INV-S5). Writing the block anew heals it.
func TestFlippedBit(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm1", "64M")
	c := s.Dial("vm1")
	data := rig.Random(5, 16<<20)
	if err := c.Write(data, 0, client.FlagFUA); err != nil {
		t.Fatal(err)
	}
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	c.Close()
	s.Stop() // a clean stop leaves everything in the object files
	const off = 5<<20 + 123_456
	path, at := findInFiles(t, s.Disks[0], data[off:off+64])
	flipBit(t, path, at)
	s.Start()

	c = s.Dial("vm1")
	got := make([]byte, 4096)
	if err := c.Read(got, off&^4095); !errors.Is(err, client.EIO) {
		t.Fatalf("read of the rotten block: %v, want EIO", err)
	}
	for o := 0; o < len(data); o += 4096 {
		if o == off&^4095 {
			continue
		}
		if err := c.Read(got, uint64(o)); err != nil {
			t.Fatalf("read at %d: %v", o, err)
		}
		if !bytes.Equal(got, data[o:o+4096]) {
			t.Fatalf("wrong data at %d", o)
		}
	}
	oid := regexp.MustCompile(`[0-9a-f]{16}`).FindString(filepath.Base(path))
	if oid == "" {
		t.Fatalf("the object file %s does not name an object", path)
	}
	rig.Contains(t, s.Log(), oid)
	rig.Contains(t, s.Dog("node", "md", "info"), oid)
	r := s.DogRun("vdi", "check", "vm1")
	if r.Code != 1 {
		t.Errorf("dog vdi check of a rotten volume: status %d, want 1", r.Code)
	}
	rig.Contains(t, r.Stdout+r.Stderr, oid)

	if err := c.Write(data[off&^4095:off&^4095+4096], off&^4095, client.FlagFUA); err != nil {
		t.Fatalf("write the block anew: %v", err)
	}
	if err := c.Read(got, off&^4095); err != nil || !bytes.Equal(got, data[off&^4095:off&^4095+4096]) {
		t.Errorf("read after writing anew: %v", err)
	}
}

// findInFiles finds the object file and the position that hold a piece of data.
func findInFiles(t *testing.T, dir string, piece []byte) (path string, at int64) {
	t.Helper()
	filepath.WalkDir(filepath.Join(dir, "objects"), func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || path != "" {
			return nil
		}
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		if i := bytes.Index(b, piece); i >= 0 {
			path, at = p, int64(i)
		}
		return nil
	})
	if path == "" {
		t.Fatalf("the data is in no object file below %s", dir)
	}
	return path, at
}

func flipBit(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
}

// A full disk: writes that need space get ENOSPC, reads and overwrites go on, a restart on the full disk
// works, and what is deleted can be used again. Nothing that was written is lost.
func TestFullDisk(t *testing.T) {
	besideOthers(t)
	disk := rig.Tmpfs(t, "400M")
	s := rig.Start(t, rig.Options{Disks: []string{disk}, Config: "storage:\n  log_limit: 64M\n  reserve: 64M\n"})
	s.Dog("vdi", "create", "small", "16M")
	s.Dog("vdi", "create", "big", "2G")
	small, big := s.Dial("small"), s.Dial("big")
	keep := rig.Random(1, 8<<20)
	if err := small.Write(keep, 0, client.FlagFUA); err != nil {
		t.Fatal(err)
	}

	written := fill(t, big, 1<<20)
	t.Logf("%d MiB fit on a disk of 400 MiB", written)
	if written < 150 {
		t.Errorf("only %d MiB fit on a disk of 400 MiB", written)
	}
	fill(t, big, 4096)

	check := func(when string) {
		t.Helper()
		c := s.Dial("small")
		defer c.Close()
		got := make([]byte, len(keep))
		if err := c.Read(got, 0); err != nil || !bytes.Equal(got, keep) {
			t.Errorf("%s: read: %v, equal %v", when, err, bytes.Equal(got, keep))
		}
		for i := range 64 { // overwrites in place need no new space
			copy(keep[i*40_960:], rig.Random(uint64(i), 4096))
			if err := c.Write(keep[i*40_960:i*40_960+4096], uint64(i)*40_960, client.FlagFUA); err != nil {
				t.Errorf("%s: overwrite %d: %v", when, i, err)
				return
			}
		}
		if err := c.Flush(); err != nil {
			t.Errorf("%s: flush: %v", when, err)
		}
	}
	check("on the full disk")
	rig.Contains(t, strings.ToLower(s.Dog("node", "md", "info")), "full")
	s.Stop()
	s.Start()
	check("after a restart on the full disk")
	s.Kill()
	s.Start()
	check("after a crash on the full disk")

	big = s.Dial("big")
	if err := big.Trim(0, 64<<20); err != nil {
		t.Errorf("discard on a full disk: %v", err)
	}
	big.Close()
	small.Close()
	eventually(t, 20*time.Second, "the volume can be deleted", func() error {
		if r := s.DogRun("vdi", "delete", "big"); r.Code != 0 {
			return errors.New(r.Stderr)
		}
		return nil
	})
	s.Dog("vdi", "create", "again", "1G")
	again := s.Dial("again")
	p := rig.Random(2, 1<<20)
	eventually(t, 30*time.Second, "space comes back", func() error {
		for i := range uint64(100) {
			if err := again.Write(p, i<<20, client.FlagFUA); err != nil {
				return fmt.Errorf("write of MiB %d: %w", i, err)
			}
		}
		return nil
	})
	check("after space came back")
	noPanic(t, s)
}

// fill writes pieces until there is no space, and returns how many fitted.
func fill(t *testing.T, c *client.Conn, piece int) int {
	t.Helper()
	p := rig.Random(9, piece)
	start := c.Size / 4
	if piece < 1<<20 {
		start = c.Size / 2
	}
	for i := range 1 << 20 {
		err := c.Write(p, start+uint64(i*piece), 0)
		if err == nil && i%16 == 0 {
			err = c.Flush()
		}
		if err == nil {
			continue
		}
		if !errors.Is(err, client.ENOSPC) {
			t.Fatalf("piece %d of %d bytes: %v, want ENOSPC", i, piece, err)
		}
		return i
	}
	t.Fatal("the disk never got full")
	return 0
}

// eventually repeats until f succeeds.
func eventually(t *testing.T, limit time.Duration, what string, f func() error) {
	t.Helper()
	limit *= patience()
	deadline := time.Now().Add(limit)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not after %v: %s: %v", limit, what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// Two daemons never use one disk, and a disk of another node or of a newer format is refused.
func TestDiskIdentity(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	other := rig.New(t, rig.Options{Disks: s.Disks})
	other.Launch()
	if code := other.Wait(endLimit); code != 1 {
		t.Errorf("a second daemon on the same disk: status %d, want 1", code)
	}
	rig.Contains(t, other.Log(), s.Disks[0])
	s.Stop()
	identity := filepath.Join(s.Disks[0], "sheep.json")
	b, err := os.ReadFile(identity)
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(identity, []byte("{nonsense"), 0o644)
	s.Launch()
	if code := s.Wait(endLimit); code != 1 {
		t.Errorf("a daemon on a disk with a broken sheep.json: status %d, want 1", code)
	}
	rig.Contains(t, s.Log(), "sheep.json")
	os.WriteFile(identity, b, 0o644)
	s.Start()
}

// Several disks share the objects, and all of them come back.
func TestSeveralDisks(t *testing.T) {
	besideOthers(t)
	disks := []string{t.TempDir(), t.TempDir(), t.TempDir()}
	s := rig.Start(t, rig.Options{Disks: disks})
	s.Dog("vdi", "create", "vm1", "256M")
	c := s.Dial("vm1")
	data := rig.Random(4, 128<<20)
	for off := 0; off < len(data); off += 4 << 20 {
		if err := c.Write(data[off:off+4<<20], uint64(off), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	for _, d := range disks {
		if used := rig.ObjectUsage(t, d); used < 16<<20 {
			t.Errorf("disk %s holds only %d bytes of 128 MiB", d, used)
		}
	}
	s.Kill()
	s.Start()
	c = s.Dial("vm1")
	got := make([]byte, 4<<20)
	for off := 0; off < len(data); off += len(got) {
		if err := c.Read(got, uint64(off)); err != nil || !bytes.Equal(got, data[off:off+len(got)]) {
			t.Fatalf("read at %d: %v", off, err)
		}
	}
}
