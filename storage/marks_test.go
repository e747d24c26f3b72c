package storage

import (
	"maps"
	"testing"

	"sheepdog/storage/disk"
	"sheepdog/storage/object"
)

// Marks survive a restart, on the disk of their group; damaged ones are none.
func TestMarks(t *testing.T) {
	dirs := []disk.FS{openDir(t), openDir(t)}
	open := func() *Store {
		s, err := Open(Config{Disks: dirs, Node: "n", ScrubRate: -1})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	want := map[object.Group]object.Version{}
	for i := range object.Partition(20) {
		g := object.Group{Policy: 1, Partition: i}
		do(t, s, &object.Request{Op: object.OpWrite, SizeShift: 20, ID: 1, Policy: 1, Partition: i, Len: 1, Data: []byte{1}})
		want[g] = object.Version{Epoch: 7, Seq: uint64(i)}
	}
	want[object.Group{Policy: 2}] = object.Version{Epoch: 1} // there are no objects of it
	if err := s.KeepMarks(want); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = open()
	if got := s.Marks(); !maps.Equal(got, want) {
		t.Errorf("marks are %v, want %v", got, want)
	}
	s.Close()
	f, err := dirs[0].OpenFile(marksName, 0)
	if err != nil {
		t.Fatal(err)
	}
	size, _ := f.Size()
	if _, err := f.WriteAt([]byte{0xff}, size/2); err != nil {
		t.Fatal(err)
	}
	f.Close()
	s = open()
	defer s.Close()
	got := s.Marks()
	if len(got) == 0 || len(got) >= len(want) {
		t.Errorf("with one of two files damaged there are %d of %d marks", len(got), len(want))
	}
}

// A disk that comes back empty says of no partition any more that nothing of it is missing, whoever emptied it.
func TestEmptyDiskHasNoMarks(t *testing.T) {
	g := object.Group{Policy: 1, Partition: 3}
	for name, add := range map[string]func(*Store, disk.FS, func(DiskStatus) error) (DiskStatus, error){"plug": (*Store).Plug, "reuse": (*Store).Reuse} {
		t.Run(name, func(t *testing.T) {
			dir := openDir(t)
			old, err := Open(Config{Disks: []disk.FS{dir}, Node: "n", ScrubRate: -1})
			if err != nil {
				t.Fatal(err)
			}
			do(t, old, &object.Request{Op: object.OpWrite, SizeShift: 20, ID: 1, Policy: 1, Partition: 3, Len: 1, Data: []byte{1}})
			if err := old.KeepMarks(map[object.Group]object.Version{g: {Epoch: 9}}); err != nil {
				t.Fatal(err)
			}
			if name == "plug" { // only empty disks are plugged
				if err := old.Delete(t.Context(), object.Key{Group: g, ID: 1}); err != nil {
					t.Fatal(err)
				}
			}
			old.Close()
			s, err := Open(Config{Disks: []disk.FS{openDir(t)}, Node: "n", ScrubRate: -1})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if _, err := add(s, dir, func(DiskStatus) error { return nil }); err != nil {
				t.Fatal(err)
			}
			if got := s.Marks(); len(got) > 0 {
				t.Errorf("marks of another life are believed: %v", got)
			}
		})
	}
}

// Marks that were taken before a group left its disk, and are kept afterwards, do not vouch for the place where it has nothing; those of what
// comes there do.
func TestMarksOfAbandonedAreNotKept(t *testing.T) {
	s, err := Open(Config{Disks: []disk.FS{openDir(t), openDir(t)}, Node: "n", ScrubRate: -1, MoveRate: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	taken := map[object.Group]object.Version{}
	for i := range object.Partition(20) {
		do(t, s, &object.Request{Op: object.OpWrite, SizeShift: 20, ID: 1, Policy: 1, Partition: i, Len: 1, Data: []byte{1}})
		taken[object.Group{Policy: 1, Partition: i}] = object.Version{Epoch: 7}
	}
	id := s.Status().Disks[0].ID
	if err := s.Retire(id); err != nil {
		t.Fatal(err)
	}
	if err := s.Release(id); err != nil {
		t.Fatal(err)
	}
	held, err := s.Held(id)
	if err != nil || len(held) == 0 {
		t.Fatalf("the disk holds %v: %v", held, err)
	}
	for _, g := range held {
		if !s.Abandon(g) {
			t.Fatalf("%s does not leave", g)
		}
	}
	want := maps.Clone(taken)
	for _, g := range held {
		delete(want, g)
	}
	for _, want := range []map[object.Group]object.Version{want, taken} {
		if err := s.KeepMarks(taken); err != nil {
			t.Fatal(err)
		}
		if got := s.Marks(); !maps.Equal(got, want) {
			t.Errorf("marks are %v, want %v", got, want)
		}
	}
}

func openDir(t *testing.T) disk.FS {
	t.Helper()
	d, err := disk.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// do carries out a request that must succeed.
func do(t *testing.T, s *Store, r *object.Request) {
	t.Helper()
	done := make(chan struct{})
	r.Done = func(*object.Request) { close(done) }
	s.Submit(r)
	s.Kick()
	<-done
	if r.Err != nil {
		t.Fatal(r.Err)
	}
}

func FuzzMarks(f *testing.F) {
	f.Add(encodeMarks(map[object.Group]object.Version{{Policy: 1, Partition: 2}: {Epoch: 3, Seq: 4}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		marks, err := decodeMarks(b)
		if err == nil && len(marks)*markSize > len(b) {
			t.Error("more marks than there is room for")
		}
	})
}
