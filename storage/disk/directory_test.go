package disk_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sheepdog/storage/disk"
	"sheepdog/storage/disk/disktest"
)

func openTemp(t *testing.T) disk.FS {
	t.Helper()
	fsys, err := disk.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return fsys
}

func TestConform(t *testing.T) { disktest.Conform(t, openTemp) }

// tmpfs refuses RWF_NOWAIT where ext4 does not.
func TestConformMemory(t *testing.T) {
	disktest.Conform(t, func(t *testing.T) disk.FS {
		dir, err := os.MkdirTemp("/dev/shm", "disk")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		fsys, err := disk.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		return fsys
	})
}

func TestOpenMissing(t *testing.T) {
	if _, err := disk.Open(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("error is %v", err)
	}
}

// A symbolic link that leads out of the directory leads nowhere.
func TestLinksAreConfined(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(dir, "out")); err != nil {
		t.Fatal(err)
	}
	fsys, err := disk.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fsys.OpenFile("out/secret", 0); err == nil {
		t.Fatal("a file outside was opened")
	}
	if err := fsys.Remove("out/secret"); err == nil {
		t.Fatal("a file outside was removed")
	}
}

// Two openings of a directory exclude one another, as two processes do.
func TestLockExcludesOthers(t *testing.T) {
	dir := t.TempDir()
	a, err := disk.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	b, err := disk.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	l, err := a.Lock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Lock(); !errors.Is(err, disk.ErrLocked) || !strings.Contains(err.Error(), dir) {
		t.Fatalf("error is %v", err)
	}
	if b.String() != dir {
		t.Fatalf("the directory is called %s", b)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if l, err = b.Lock(); err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// What was just written is in the page cache: a read need not wait for the disk.
func TestNowaitReadsCachedData(t *testing.T) {
	fsys := openTemp(t)
	f, err := fsys.OpenFile("a", disk.Create)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 4096)
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if n, err := f.ReadNowait(b, 0); err != nil && !errors.Is(err, disk.ErrWouldBlock) || err == nil && n != len(b) {
		t.Fatalf("read %d bytes: %v", n, err)
	}
}

func BenchmarkReadNowait(b *testing.B) {
	fsys, err := disk.Open(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	f, err := fsys.OpenFile("a", disk.Create)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 4096)
	if _, err := f.WriteAt(p, 0); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		if _, err := f.ReadNowait(p, 0); err != nil {
			b.Fatal(err)
		}
	}
}
