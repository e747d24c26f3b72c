package disktest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"testing"

	"sheepdog/storage/disk"
)

func TestConform(t *testing.T) {
	Conform(t, func(*testing.T) disk.FS { return New("memory") })
}

// A disk that a power cut has passed over is a disk like any other.
func TestConformAfterCrash(t *testing.T) {
	Conform(t, func(t *testing.T) disk.FS {
		d := New("memory")
		f := create(t, d, "gone")
		put(t, f, make([]byte, 9000), 0)
		d = d.Reopen(0).Restart()
		return d
	})
}

func open(t *testing.T, fsys disk.FS, name string) disk.File {
	t.Helper()
	f, err := fsys.OpenFile(name, 0)
	must(t, err)
	return f
}

// outcomes gathers what is found after power cuts with many seeds.
func outcomes(d *Disk, seeds uint64, look func(*Disk) string) map[string]int {
	found := map[string]int{}
	for seed := range seeds {
		found[look(d.Reopen(seed))]++
	}
	return found
}

func wantOutcomes(t *testing.T, found map[string]int, want ...string) {
	t.Helper()
	allowed := map[string]bool{}
	for _, w := range want {
		allowed[w] = true
		if found[w] == 0 {
			t.Errorf("never seen: %q", w)
		}
	}
	for f := range found {
		if !allowed[f] {
			t.Errorf("must not happen: %q", f)
		}
	}
}

func TestSyncedSurvives(t *testing.T) {
	d := New("memory")
	must(t, d.MkdirAll("x/y"))
	f := create(t, d, "x/y/a")
	want := bytes.Repeat([]byte{3}, 10000)
	put(t, f, want, 5)
	must(t, f.PunchHole(4096, 4096))
	must(t, f.Sync())
	for _, dir := range []string{"x/y", "x", "."} {
		must(t, d.SyncDir(dir))
	}
	want = append(make([]byte, 5), want...)
	clear(want[4096:8192])
	for seed := range uint64(20) {
		content(t, open(t, d.Reopen(seed), "x/y/a"), want)
	}
}

func TestSectorsSurviveByThemselves(t *testing.T) {
	d := New("memory")
	f := create(t, d, "a")
	put(t, f, bytes.Repeat([]byte{'o'}, 3*512), 0)
	must(t, f.Sync())
	must(t, d.SyncDir("."))
	put(t, f, bytes.Repeat([]byte{'n'}, 2*512), 0)
	put(t, f, bytes.Repeat([]byte{'N'}, 512), 512)
	found := outcomes(d, 300, func(d *Disk) string {
		b := make([]byte, 3*512)
		if _, err := open(t, d, "a").ReadAt(b, 0); err != nil {
			t.Fatal(err)
		}
		for s := range 3 {
			if !bytes.Equal(b[s*512:][:512], bytes.Repeat(b[s*512:][:1], 512)) {
				t.Fatal("a sector is torn")
			}
		}
		return string([]byte{b[0], b[512], b[1024]})
	})
	wantOutcomes(t, found, "ooo", "noo", "ono", "nno", "oNo", "nNo")
}

func TestSizeIsVolatile(t *testing.T) {
	d := New("memory")
	f := create(t, d, "a")
	put(t, f, []byte{1}, 99)
	must(t, f.Sync())
	must(t, d.SyncDir("."))
	put(t, f, []byte{2}, 4999)
	found := outcomes(d, 200, func(d *Disk) string {
		f := open(t, d, "a")
		size, err := f.Size()
		must(t, err)
		b := make([]byte, 1)
		_, _ = f.ReadAt(b, 4999)
		return fmt.Sprint(size, b[0])
	})
	wantOutcomes(t, found, "100 0", "5000 0", "5000 2")
}

func TestHolesAreVolatile(t *testing.T) {
	d := New("memory")
	f := create(t, d, "a")
	put(t, f, bytes.Repeat([]byte{1}, 8192), 0)
	must(t, f.Sync())
	must(t, d.SyncDir("."))
	used := d.Used()
	must(t, f.PunchHole(0, 4096))
	if d.Used() != used-4096 {
		t.Fatalf("hole freed %d bytes", used-d.Used())
	}
	kept, freed := d.Reopen(0), d.Reopen(1)
	if kept.Used() != used || freed.Used() != used-4096 {
		t.Fatalf("used is %d without the hole and %d with it", kept.Used(), freed.Used())
	}
	content(t, open(t, kept, "a"), bytes.Repeat([]byte{1}, 8192))
	content(t, open(t, freed, "a"), append(make([]byte, 4096), bytes.Repeat([]byte{1}, 4096)...))
}

func names(t *testing.T, d *Disk, dir string) string {
	names, err := d.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return "none"
	}
	must(t, err)
	return fmt.Sprint(names)
}

func TestEntriesAreVolatile(t *testing.T) {
	d := New("memory")
	create(t, d, "a")
	must(t, d.SyncDir("."))
	create(t, d, "b")
	must(t, d.Remove("a"))
	wantOutcomes(t, outcomes(d, 100, func(d *Disk) string { return names(t, d, ".") }),
		"[]", "[a]", "[b]", "[a b]")
}

func TestDirectoriesAreVolatile(t *testing.T) {
	d := New("memory")
	must(t, d.MkdirAll("x"))
	create(t, d, "x/a")
	must(t, d.SyncDir("x"))
	wantOutcomes(t, outcomes(d, 100, func(d *Disk) string { return names(t, d, "x") }), "none", "[a]")
}

// A rename happens as a whole, and not before the file got its old name.
func TestRenameIsAtomic(t *testing.T) {
	d := New("memory")
	must(t, d.MkdirAll("x"))
	must(t, d.SyncDir("."))
	create(t, d, "x/b")
	must(t, d.SyncDir("x"))
	f := create(t, d, "a")
	put(t, f, []byte("a"), 0)
	must(t, f.Sync())
	look := func(d *Disk) string {
		size, err := open(t, d, "x/b").Size()
		must(t, err)
		return fmt.Sprintf("%s %d", names(t, d, "."), size)
	}
	must(t, d.Rename("a", "x/b"))
	wantOutcomes(t, outcomes(d.Restart(), 100, look), "[x] 0", "[a x] 0", "[x] 1")

	d = d.Restart()
	must(t, d.SyncDir("x"))
	wantOutcomes(t, outcomes(d.Restart(), 100, look), "[x] 0", "[a x] 0", "[x] 1")
	d = d.Restart()
	must(t, d.SyncDir("."))
	wantOutcomes(t, outcomes(d, 100, look), "[x] 1")
}

// Neither a kill nor two of them make anything durable.
func TestRestartKeepsVolatileState(t *testing.T) {
	d := New("memory")
	f := create(t, d, "a")
	must(t, f.Sync())
	must(t, d.SyncDir("."))
	put(t, f, []byte("lost"), 0)
	create(t, d, "b")
	d2 := d.Restart().Restart()
	if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, ErrCrashed) {
		t.Fatalf("write to a disk that was taken over: %v", err)
	}
	content(t, open(t, d2, "a"), []byte("lost"))
	content(t, open(t, d2, "b"), nil)
	d3 := d2.Reopen(0)
	content(t, open(t, d3, "a"), nil)
	if got := names(t, d3, "."); got != "[a]" {
		t.Fatal(got)
	}
}

func TestSameSeedSameOutcome(t *testing.T) {
	d := New("memory")
	f := create(t, d, "a")
	must(t, d.SyncDir("."))
	for i := range 100 {
		put(t, f, bytes.Repeat([]byte{byte(i)}, 700), int64(i*300))
	}
	for seed := range uint64(20) {
		a, b := open(t, d.Reopen(seed), "a"), open(t, d.Reopen(seed), "a")
		size, err := a.Size()
		must(t, err)
		want := make([]byte, size)
		_, _ = a.ReadAt(want, 0)
		content(t, b, want)
	}
}

func TestCrashAt(t *testing.T) {
	for n := int64(1); n <= 4; n++ {
		d := New("memory")
		d.CrashAt(n)
		step := func() error {
			f, err := d.OpenFile("a", disk.Create)
			if err != nil {
				return err
			}
			if _, err := f.WriteAt([]byte("x"), 0); err != nil {
				return err
			}
			if err := f.Sync(); err != nil {
				return err
			}
			return d.SyncDir(".")
		}
		wantError(t, step(), ErrCrashed)
		if !d.Crashed() || d.Changes() != n {
			t.Fatalf("crashed %v after %d changes, want %d", d.Crashed(), d.Changes(), n)
		}
		_, err := d.ReadDir(".")
		wantError(t, err, ErrCrashed)
		_, err = d.Lock()
		wantError(t, err, ErrCrashed)
		for _, seed := range []uint64{0, 1} {
			if got, want := names(t, d.Reopen(seed), "."), []string{"[]", "[a]"}[seed]; got != want {
				t.Fatalf("crash at %d, seed %d: %s", n, seed, got)
			}
		}
	}
}

func TestCrashFreesLock(t *testing.T) {
	d := New("memory")
	_, err := d.Lock()
	must(t, err)
	_, err = d.Reopen(2).Lock()
	must(t, err)
	_, err = d.Restart().Lock()
	must(t, err)
}

func TestCapacity(t *testing.T) {
	d := New("memory")
	f := create(t, d, "a")
	d.SetCapacity(4 * 4096)
	put(t, f, bytes.Repeat([]byte{1}, 3*4096), 0)
	n, err := f.WriteAt(bytes.Repeat([]byte{2}, 3*4096), 2*4096)
	wantError(t, err, syscall.ENOSPC)
	if n != 2*4096 {
		t.Fatalf("%d bytes were written", n)
	}
	content(t, f, append(bytes.Repeat([]byte{1}, 2*4096), bytes.Repeat([]byte{2}, 2*4096)...))
	put(t, f, bytes.Repeat([]byte{3}, 4*4096), 0) // in place
	wantError(t, f.Allocate(4*4096, 1), syscall.ENOSPC)
	_, err = d.OpenFile("b", disk.Create)
	wantError(t, err, syscall.ENOSPC)
	wantError(t, d.MkdirAll("x"), syscall.ENOSPC)
	u, err := d.Usage()
	must(t, err)
	if u != (disk.Usage{Total: 4 * 4096}) {
		t.Fatalf("usage is %+v", u)
	}
	must(t, f.PunchHole(4096, 4096))
	put(t, f, []byte{1}, 100000)
	must(t, f.Close())
	must(t, d.Remove("a"))
	if d.Used() != 0 {
		t.Fatalf("%d bytes are used on an empty disk", d.Used())
	}
	d.SetCapacity(0)
	create(t, d, "b")
}

func TestHook(t *testing.T) {
	d := New("memory")
	f := create(t, d, "a")
	must(t, d.MkdirAll("x"))
	g := create(t, d, "x/b")
	d.Hook(FailNth(2, false, syscall.EIO, Named("x/*", OpWrite)))
	put(t, g, []byte("1"), 0)
	put(t, f, []byte("1"), 0)
	_, err := g.WriteAt([]byte("2"), 0)
	wantError(t, err, syscall.EIO)
	content(t, g, []byte("1"))
	put(t, g, []byte("3"), 0)
	d.Hook(FailNth(1, true, disk.ErrWouldBlock, func(op Op) bool { return op.Kind == OpReadNowait }))
	for range 3 {
		_, err := f.ReadNowait(make([]byte, 1), 0)
		wantError(t, err, disk.ErrWouldBlock)
	}
	if d.Count(OpReadNowait) != 3 {
		t.Fatalf("%d operations counted", d.Count(OpReadNowait))
	}
	d.Hook(nil)
	content(t, f, []byte("1"))
}

func TestFlip(t *testing.T) {
	d := New("memory")
	f := create(t, d, "a")
	put(t, f, []byte("abc"), 0)
	must(t, f.Sync())
	must(t, d.SyncDir("."))
	must(t, d.Flip("a", 1, 0x20))
	content(t, f, []byte("aBc"))
	put(t, f, []byte("A"), 0)
	content(t, f, []byte("ABc"))
	must(t, d.Flip("a", 2, 0x20))
	content(t, open(t, d.Reopen(0), "a"), []byte("aBC"))
	if err := d.Flip("a", 3, 1); err == nil {
		t.Fatal("flipped a bit behind the end")
	}
}
