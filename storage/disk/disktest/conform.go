package disktest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"sheepdog/storage/disk"
)

// Conform checks an implementation of disk.FS; open returns a new, empty one.
func Conform(t *testing.T, open func(t *testing.T) disk.FS) {
	for _, c := range []struct {
		name string
		test func(*testing.T, disk.FS)
	}{
		{"open", conformOpen},
		{"read and write", conformReadWrite},
		{"read without waiting", conformNowait},
		{"holes", conformHoles},
		{"allocate", conformAllocate},
		{"truncate", conformTruncate},
		{"next data", conformNextData},
		{"remove", conformRemove},
		{"rename", conformRename},
		{"directories", conformDirectories},
		{"confined names", conformConfined},
		{"usage", conformUsage},
		{"lock", conformLock},
		{"closed", conformClosed},
		{"random operations", conformRandom},
		{"concurrency", conformConcurrency},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, open(t)) })
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error is %v, want %v", err, want)
	}
}

func create(t *testing.T, fsys disk.FS, name string) disk.File {
	t.Helper()
	f, err := fsys.OpenFile(name, disk.Create)
	must(t, err)
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func put(t *testing.T, f disk.File, b []byte, off int64) {
	t.Helper()
	n, err := f.WriteAt(b, off)
	must(t, err)
	if n != len(b) {
		t.Fatalf("wrote %d of %d bytes", n, len(b))
	}
}

// content checks the whole of a file.
func content(t *testing.T, f disk.File, want []byte) {
	t.Helper()
	size, err := f.Size()
	must(t, err)
	if size != int64(len(want)) {
		t.Fatalf("size is %d, want %d", size, len(want))
	}
	got := make([]byte, len(want)+1)
	n, err := f.ReadAt(got, 0)
	wantError(t, err, io.EOF)
	if !bytes.Equal(got[:n], want) {
		t.Fatalf("content differs at %d", firstDifference(got[:n], want))
	}
}

func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

func conformOpen(t *testing.T, fsys disk.FS) {
	_, err := fsys.OpenFile("a", 0)
	wantError(t, err, fs.ErrNotExist)
	_, err = fsys.OpenFile("no/a", disk.Create)
	wantError(t, err, fs.ErrNotExist)
	f, err := fsys.OpenFile("a", disk.Create|disk.Exclusive)
	must(t, err)
	put(t, f, []byte("kept"), 0)
	must(t, f.Close())
	_, err = fsys.OpenFile("a", disk.Create|disk.Exclusive)
	wantError(t, err, fs.ErrExist)
	content(t, create(t, fsys, "a"), []byte("kept"))
	must(t, fsys.MkdirAll("d"))
	if _, err := fsys.OpenFile("d", 0); err == nil {
		t.Fatal("a directory was opened as a file")
	}
	if fsys.String() == "" {
		t.Fatal("no name")
	}
}

func conformReadWrite(t *testing.T, fsys disk.FS) {
	f := create(t, fsys, "a")
	content(t, f, nil)
	put(t, f, []byte("hello"), 10000)
	want := append(make([]byte, 10000), "hello"...)
	content(t, f, want)
	put(t, f, []byte("HE"), 10000)
	copy(want[10000:], "HE")
	content(t, f, want)
	g, err := fsys.OpenFile("a", 0)
	must(t, err)
	defer g.Close()
	content(t, g, want)
	must(t, f.Sync())
	must(t, f.StartWriteback(0, int64(len(want))))
	n, err := f.ReadAt(make([]byte, 8), 20000)
	wantError(t, err, io.EOF)
	if n != 0 {
		t.Fatalf("read %d bytes behind the end", n)
	}
	if n, err := f.WriteAt(nil, 5); n != 0 || err != nil {
		t.Fatalf("empty write: %d, %v", n, err)
	}
	if _, err := f.ReadAt(make([]byte, 1), -1); err == nil || errors.Is(err, io.EOF) {
		t.Fatalf("negative offset: %v", err)
	}
	const far = 3 << 30
	put(t, f, []byte{1}, far)
	b := make([]byte, 3)
	n, err = f.ReadAt(b, far-2)
	must(t, errorsUnless(err, io.EOF))
	if n != 3 || !bytes.Equal(b, []byte{0, 0, 1}) {
		t.Fatalf("far away: %d bytes, %v", n, b)
	}
}

func errorsUnless(err, allowed error) error {
	if errors.Is(err, allowed) {
		return nil
	}
	return err
}

func conformNowait(t *testing.T, fsys disk.FS) {
	f := create(t, fsys, "a")
	want := bytes.Repeat([]byte("0123456789abcdef"), 1024)
	put(t, f, want, 0)
	for _, c := range []struct{ off, n, want int }{{0, 4096, 4096}, {5000, 300, 300}, {16000, 4096, 384}} {
		b := make([]byte, c.n)
		n, err := f.ReadNowait(b, int64(c.off))
		if errors.Is(err, disk.ErrWouldBlock) {
			continue // always allowed
		}
		must(t, err)
		if n == 0 || n > c.want || !bytes.Equal(b[:n], want[c.off:][:n]) {
			t.Fatalf("read %d bytes at %d, want up to %d, or other content", n, c.off, c.want)
		}
	}
	if n, err := f.ReadNowait(make([]byte, 1), 16384); n != 0 || !errors.Is(err, io.EOF) && !errors.Is(err, disk.ErrWouldBlock) {
		t.Fatalf("behind the end: %d, %v", n, err)
	}
	if n, err := f.ReadNowait(nil, 0); n != 0 || err != nil {
		t.Fatalf("empty read: %d, %v", n, err)
	}
	b := make([]byte, 4096)
	if allocs := testing.AllocsPerRun(100, func() { _, _ = f.ReadNowait(b, 4096) }); allocs != 0 {
		t.Fatalf("%v allocations", allocs)
	}
}

func conformHoles(t *testing.T, fsys disk.FS) {
	f := create(t, fsys, "a")
	want := bytes.Repeat([]byte{7}, 40000)
	put(t, f, want, 0)
	for _, h := range []struct{ off, n int64 }{{4096, 8192}, {100, 50}, {20000, 9000}, {39000, 100000}, {500000, 4096}} {
		must(t, f.PunchHole(h.off, h.n))
		for i := h.off; i < min(h.off+h.n, 40000); i++ {
			want[i] = 0
		}
		content(t, f, want)
	}
	put(t, f, []byte{1, 2, 3}, 5000)
	copy(want[5000:], []byte{1, 2, 3})
	content(t, f, want)
}

func conformAllocate(t *testing.T, fsys disk.FS) {
	f := create(t, fsys, "a")
	put(t, f, []byte("abc"), 0)
	must(t, f.Allocate(0, 100))
	content(t, f, append([]byte("abc"), make([]byte, 97)...))
	must(t, f.Allocate(8192, 4096))
	content(t, f, append([]byte("abc"), make([]byte, 12285)...))
	must(t, f.Allocate(0, 10))
	content(t, f, append([]byte("abc"), make([]byte, 12285)...))
}

func conformTruncate(t *testing.T, fsys disk.FS) {
	f := create(t, fsys, "a")
	want := bytes.Repeat([]byte{9}, 10000)
	put(t, f, want, 0)
	must(t, f.Truncate(5000))
	content(t, f, want[:5000])
	must(t, f.Truncate(9000))
	content(t, f, append(want[:5000:5000], make([]byte, 4000)...))
	must(t, f.Truncate(0))
	content(t, f, nil)
	if _, _, err := f.NextData(0); !errors.Is(err, io.EOF) {
		t.Fatalf("data in an empty file: %v", err)
	}
}

func conformNextData(t *testing.T, fsys disk.FS) {
	const mib = 1 << 20
	f := create(t, fsys, "a")
	must(t, f.Truncate(16*mib))
	for _, at := range []int64{2 * mib, 8 * mib} {
		put(t, f, bytes.Repeat([]byte{5}, mib), at)
	}
	must(t, f.PunchHole(8*mib+mib/4, mib/2))
	var got [][2]int64
	for off := int64(0); ; {
		start, end, err := f.NextData(off)
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		if start < off || end <= start {
			t.Fatalf("run [%d,%d) after %d", start, end, off)
		}
		got = append(got, [2]int64{start, end})
		off = end
	}
	want := [][2]int64{{2 * mib, 3 * mib}, {8 * mib, 8*mib + mib/4}, {8*mib + 3*mib/4, 9 * mib}}
	if !slices.Equal(got, want) {
		t.Fatalf("runs are %v, want %v", got, want)
	}
	start, _, err := f.NextData(2*mib + 5000)
	must(t, err)
	if start != 2*mib+5000 {
		t.Fatalf("within a run: %d", start)
	}
	if _, _, err := f.NextData(32 * mib); !errors.Is(err, io.EOF) {
		t.Fatalf("behind the end: %v", err)
	}
}

func conformRemove(t *testing.T, fsys disk.FS) {
	wantError(t, fsys.Remove("a"), fs.ErrNotExist)
	f := create(t, fsys, "a")
	put(t, f, []byte("still here"), 0)
	must(t, fsys.Remove("a"))
	_, err := fsys.OpenFile("a", 0)
	wantError(t, err, fs.ErrNotExist)
	content(t, f, []byte("still here"))
	put(t, f, []byte("S"), 0)
	content(t, f, []byte("Still here"))
	content(t, create(t, fsys, "a"), nil)
	must(t, fsys.MkdirAll("d/e"))
	if err := fsys.Remove("d"); err == nil {
		t.Fatal("a directory that is not empty was removed")
	}
	must(t, fsys.Remove("d/e"))
	must(t, fsys.Remove("d"))
	wantError(t, fsys.Remove("d"), fs.ErrNotExist)
}

func conformRename(t *testing.T, fsys disk.FS) {
	wantError(t, fsys.Rename("a", "b"), fs.ErrNotExist)
	must(t, fsys.MkdirAll("d"))
	a := create(t, fsys, "a")
	put(t, a, []byte("new"), 0)
	b := create(t, fsys, "d/b")
	put(t, b, []byte("old"), 0)
	must(t, fsys.Rename("a", "d/b"))
	_, err := fsys.OpenFile("a", 0)
	wantError(t, err, fs.ErrNotExist)
	content(t, create(t, fsys, "d/b"), []byte("new"))
	content(t, b, []byte("old"))
	put(t, a, []byte("N"), 0)
	content(t, create(t, fsys, "d/b"), []byte("New"))
	wantError(t, fsys.Rename("d/b", "none/b"), fs.ErrNotExist)
	must(t, fsys.Rename("d/b", "d/b"))
	content(t, create(t, fsys, "d/b"), []byte("New"))
}

func conformDirectories(t *testing.T, fsys disk.FS) {
	must(t, fsys.MkdirAll("x/y/z"))
	must(t, fsys.MkdirAll("x/y"))
	must(t, fsys.MkdirAll("."))
	for _, name := range []string{"x/c", "x/a", "x/b"} {
		create(t, fsys, name)
	}
	names, err := fsys.ReadDir("x")
	must(t, err)
	if !slices.Equal(names, []string{"a", "b", "c", "y"}) {
		t.Fatalf("names are %v", names)
	}
	for _, name := range []string{".", "x", "x/y/z"} {
		must(t, fsys.SyncDir(name))
	}
	_, err = fsys.ReadDir("none")
	wantError(t, err, fs.ErrNotExist)
	wantError(t, fsys.SyncDir("none"), fs.ErrNotExist)
	if err := fsys.MkdirAll("x/a/b"); err == nil {
		t.Fatal("a directory was made below a file")
	}
	if _, err := fsys.ReadDir("x/a"); err == nil {
		t.Fatal("a file was listed")
	}
	names, err = fsys.ReadDir("x/y/z")
	must(t, err)
	if len(names) != 0 {
		t.Fatalf("names in an empty directory: %v", names)
	}
}

func conformConfined(t *testing.T, fsys disk.FS) {
	must(t, fsys.MkdirAll("d"))
	create(t, fsys, "f")
	for _, name := range []string{"../x", "d/../../x", "/tmp/x", ""} {
		if f, err := fsys.OpenFile(name, disk.Create); err == nil {
			f.Close()
			t.Fatalf("%q was opened", name)
		}
		if err := fsys.Rename("f", name); err == nil {
			t.Fatalf("renamed to %q", name)
		}
		if err := fsys.Remove(name); err == nil {
			t.Fatalf("%q was removed", name)
		}
		if err := fsys.MkdirAll(name); err == nil {
			t.Fatalf("%q was made", name)
		}
	}
}

func conformUsage(t *testing.T, fsys disk.FS) {
	u, err := fsys.Usage()
	must(t, err)
	if u.Total == 0 || u.Free == 0 || u.Free > u.Total {
		t.Fatalf("usage is %+v", u)
	}
}

func conformLock(t *testing.T, fsys disk.FS) {
	l, err := fsys.Lock()
	must(t, err)
	_, err = fsys.Lock()
	wantError(t, err, disk.ErrLocked)
	must(t, l.Close())
	if err := l.Close(); err == nil {
		t.Fatal("a lock was given back twice")
	}
	l, err = fsys.Lock()
	must(t, err)
	must(t, l.Close())
}

func conformClosed(t *testing.T, fsys disk.FS) {
	f := create(t, fsys, "a")
	must(t, f.Close())
	wantError(t, f.Close(), fs.ErrClosed)
	if _, err := f.ReadAt(make([]byte, 1), 0); err == nil || errors.Is(err, io.EOF) {
		t.Fatalf("read after close: %v", err)
	}
	if _, err := f.WriteAt(make([]byte, 1), 0); err == nil {
		t.Fatal("write after close")
	}
}

// conformRandom compares a file with a byte slice.
func conformRandom(t *testing.T, fsys disk.FS) {
	const limit = 200000
	rng := rand.New(rand.NewPCG(1, 2))
	f := create(t, fsys, "a")
	var model []byte
	grow := func(n int64) {
		if int64(len(model)) < n {
			model = append(model, make([]byte, n-int64(len(model)))...)
		}
	}
	for i := range 2000 {
		off := rng.Int64N(limit)
		n := 1 + rng.Int64N(1+rng.Int64N(30000))
		if rng.IntN(3) == 0 {
			off, n = off&^4095, (n+4095)&^4095
		}
		var what string
		switch k := rng.IntN(20); {
		case k < 8:
			what = "write"
			b := bytes.Repeat([]byte{byte(i)}, int(n))
			put(t, f, b, off)
			grow(off + n)
			copy(model[off:], b)
		case k < 12:
			what = "punch"
			must(t, f.PunchHole(off, n))
			if off < int64(len(model)) {
				clear(model[off:min(off+n, int64(len(model)))])
			}
		case k < 14:
			what = "allocate"
			must(t, f.Allocate(off, n))
			grow(off + n)
		case k < 15:
			what = "truncate"
			must(t, f.Truncate(off))
			grow(off)
			model = model[:off:off]
		case k < 16:
			what = "sync"
			must(t, f.Sync())
		default:
			what = "read"
			b := make([]byte, n)
			got, err := f.ReadAt(b, off)
			want := model[min(off, int64(len(model))):min(off+n, int64(len(model)))]
			if got != len(want) || !bytes.Equal(b[:got], want) || (err == nil) != (got == int(n)) {
				t.Fatalf("step %d: read %d bytes at %d, %v; want %d, or other content", i, got, off, err, len(want))
			}
		}
		if i%10 == 0 {
			content(t, f, model)
			checkData(t, f, model, fmt.Sprintf("step %d: %s [%d,+%d)", i, what, off, n))
		}
	}
	content(t, f, model)
}

// checkData: what NextData passes over is zero.
func checkData(t *testing.T, f disk.File, model []byte, step string) {
	t.Helper()
	for off := int64(0); off < int64(len(model)); {
		start, end, err := f.NextData(off)
		if errors.Is(err, io.EOF) {
			start, end = int64(len(model)), int64(len(model))
		} else {
			must(t, err)
		}
		if i := slices.IndexFunc(model[off:start], func(b byte) bool { return b != 0 }); i >= 0 {
			t.Fatalf("%s: data at %d is in a hole", step, off+int64(i))
		}
		off = end
	}
}

func conformConcurrency(t *testing.T, fsys disk.FS) {
	shared := create(t, fsys, "shared")
	var wg sync.WaitGroup
	errs := make(chan error, 8)
	for w := range 8 {
		wg.Go(func() { errs <- worker(fsys, shared, w) })
	}
	wg.Wait()
	for range 8 {
		must(t, <-errs)
	}
	for w := range 8 {
		b := make([]byte, 4096)
		if _, err := shared.ReadAt(b, int64(w)*4096); errorsUnless(err, io.EOF) != nil || !bytes.Equal(b, bytes.Repeat([]byte{byte(w + 1)}, 4096)) {
			t.Fatalf("part %d of the shared file: %v", w, err)
		}
	}
}

func worker(fsys disk.FS, shared disk.File, w int) error {
	dir := fmt.Sprintf("dir%d", w)
	if err := fsys.MkdirAll(dir); err != nil {
		return err
	}
	b := bytes.Repeat([]byte{byte(w + 1)}, 4096)
	for i := range 30 {
		name := fmt.Sprintf("%s/%d", dir, i)
		f, err := fsys.OpenFile(name, disk.Create|disk.Exclusive)
		if err != nil {
			return err
		}
		_, err1 := f.WriteAt(b, int64(i)*100)
		_, err2 := shared.WriteAt(b, int64(w)*4096)
		_, _, err3 := shared.NextData(int64(w) * 4096)
		_, err4 := shared.Size()
		err = errors.Join(err1, err2, err3, err4, f.Sync(), f.Close(), fsys.SyncDir(dir))
		if err == nil && i%2 == 0 {
			err = fsys.Rename(name, name+"x")
			name += "x"
		}
		if err == nil && i%3 == 0 {
			err = fsys.Remove(name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
