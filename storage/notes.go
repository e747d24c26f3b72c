package storage

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"

	"github.com/zeebo/xxh3"

	"sheepdog/storage/disk"
	"sheepdog/storage/object"
)

// notes are what a disk says of groups that go from one disk of the node to another: see mover.
type notes struct {
	arriving map[object.Group]string // a copy begins, or was interrupted, of the disk with that id: it does not count
	// arrived: the copy is complete, and counts if the disk with that id is not there, or says that the group has left
	// it for this one. That it may have taken back.
	arrived map[object.Group]string
	left    map[object.Group]string // it lives on the disk with that id, and what is left here does not count
	// until is, of each group in left whose files are gone, the last segment of the log that may have something of it.
	until map[object.Group]uint32
}

// notesName is the file: a line with the format and the xxh3 of what follows, then notesBody as JSON.
const (
	notesName  = "moves"
	notesMagic = "sheep moves 1"
	// maxNotesBytes bounds what is read of it: all groups that there can be.
	maxNotesBytes = 1 << 28
)

// notesBody has the groups by the id of the other disk.
type notesBody struct {
	Arriving map[string][]string `json:"arriving,omitempty"`
	Arrived  map[string][]string `json:"arrived,omitempty"`
	Left     map[string][]string `json:"left,omitempty"`
}

func newNotes() notes {
	return notes{map[object.Group]string{}, map[object.Group]string{}, map[object.Group]string{}, map[object.Group]uint32{}}
}

// has reports whether what the disk has of a group does not count.
func (n *notes) has(g object.Group) bool { return n.arriving[g] != "" || n.left[g] != "" }

// forget says that nothing is left here of a group that has left the disk.
func (n *notes) forget(g object.Group) {
	delete(n.left, g)
	delete(n.until, g)
}

func (n *notes) empty() bool { return len(n.arriving)+len(n.arrived)+len(n.left) == 0 }

func (n *notes) encode() ([]byte, error) {
	body, err := json.Marshal(notesBody{byDisk(n.arriving), byDisk(n.arrived), byDisk(n.left)})
	if err != nil {
		return nil, err
	}
	return append(fmt.Appendf(nil, "%s %016x\n", notesMagic, xxh3.Hash(body)), body...), nil
}

func byDisk(groups map[object.Group]string) map[string][]string {
	m := make(map[string][]string)
	for g, id := range groups {
		m[id] = append(m[id], g.String())
	}
	return m
}

var errNotes = errors.New("file of moves is damaged: take the disk out of node.disks, start the node, and bring it back with \"dog node md plug --empty\"")

func decodeNotes(b []byte) (n notes, err error) {
	line, body, ok := bytes.Cut(b, []byte("\n"))
	if !ok || string(line) != fmt.Sprintf("%s %016x", notesMagic, xxh3.Hash(body)) {
		return n, errNotes
	}
	var v notesBody
	if err := json.Unmarshal(body, &v); err != nil {
		return n, errNotes
	}
	if n.arriving, err = byGroup(v.Arriving); err == nil {
		n.arrived, err = byGroup(v.Arrived)
	}
	if err == nil {
		n.left, err = byGroup(v.Left)
	}
	n.until = make(map[object.Group]uint32)
	return n, err
}

func byGroup(disks map[string][]string) (map[object.Group]string, error) {
	m := make(map[object.Group]string)
	for id, names := range disks {
		for _, name := range names {
			g, ok := parseGroup(name)
			if !ok || id == "" {
				return nil, errNotes
			}
			m[g] = id
		}
	}
	return m, nil
}

// readNotes gives empty ones if there is no file.
func readNotes(fsys disk.FS) (notes, error) {
	f, err := fsys.OpenFile(notesName, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return newNotes(), nil
	}
	if err != nil {
		return notes{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, maxNotesBytes))
	if err != nil {
		return notes{}, fmt.Errorf("read %s/%s: %w", fsys, notesName, err)
	}
	n, err := decodeNotes(b)
	if err != nil {
		return n, fmt.Errorf("read %s/%s: %w", fsys, notesName, err)
	}
	return n, nil
}

// renote changes the notes of a disk: durably, or not at all as far as anybody goes by them. What was forgotten here and is still
// noted there would be believed at the next start, when what it was about is long another thing. Store.mover.mu is held.
func (d *drive) renote(change func(*notes)) error {
	n := notes{maps.Clone(d.notes.arriving), maps.Clone(d.notes.arrived), maps.Clone(d.notes.left), maps.Clone(d.notes.until)}
	change(&n)
	if err := n.write(d.fs); err != nil {
		return err
	}
	d.notes = n
	return nil
}

// write makes the notes durable on a disk; stage prepares that.
func (n *notes) write(fsys disk.FS) error {
	if err := n.stage(fsys); err != nil {
		return err
	}
	return commitNotes(fsys)
}

func (n *notes) stage(fsys disk.FS) error {
	b, err := n.encode()
	if err == nil {
		err = stageWhole(fsys, notesName, b)
	}
	if err != nil {
		return fmt.Errorf("write %s/%s: %w", fsys, notesName, err)
	}
	return nil
}

func commitNotes(fsys disk.FS) error {
	if err := commitWhole(fsys, notesName); err != nil {
		return fmt.Errorf("write %s/%s: %w", fsys, notesName, err)
	}
	return nil
}

// believeNotes looks at what disks say of one another before anything else is looked at. If the disk that a group comes from is
// there, it is that one that decides where the group lives.
func (s *Store) believeNotes(disks map[string]*drive) {
	for _, d := range s.routes.drives() {
		d.untidy = !d.notes.empty()
		for g, id := range d.notes.arriving {
			if from := disks[id]; from != nil && from.notes.left[g] == d.name { // what is noted next was not, or is lost
				delete(d.notes.arriving, g)
			}
		}
		for g, id := range d.notes.arrived {
			if from := disks[id]; from != nil && from.notes.left[g] != d.name {
				d.notes.arriving[g] = id
			}
		}
		clear(d.notes.arrived)
	}
}

// tidy removes what does not count. A disk on which that fails is out of service.
func (s *Store) tidy(disks map[string]*drive) {
	for _, d := range s.routes.drives() {
		for g, id := range d.notes.left {
			if to := disks[id]; to != nil && to.notes.left[g] == "" {
				s.routes.claim(g, slices.Index(s.routes.lineup.Load().slots, to))
			}
		}
	}
	for _, d := range s.routes.drives() {
		if d.untidy && d.failed() == nil {
			if err := d.tidy(s.routes.at); err != nil {
				d.fail(err)
			}
		}
	}
}

func (d *drive) tidy(at func(object.Group) *drive) error {
	groups := slices.AppendSeq(slices.Collect(maps.Keys(d.notes.arriving)), maps.Keys(d.notes.left))
	if err := d.removeGroups(groups); err != nil {
		return err
	}
	clear(d.notes.arriving)
	homeless := false
	for g := range d.notes.left {
		d.notes.until[g] = d.log.Segment()
		homeless = homeless || at(g) == nil
	}
	if homeless { // where it lived is gone: it may get its place here, and what the log has of it must not come back
		if err := d.checkpoint(); err != nil {
			return err
		}
		maps.DeleteFunc(d.notes.left, func(g object.Group, _ string) bool { return d.notes.until[g] < d.retained.Load() })
	}
	return d.notes.write(d.fs)
}
