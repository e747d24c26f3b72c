package vdi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"

	"sheepdog/vdi/backup"
	"sheepdog/vdi/catalog"
)

// Backup writes the snapshot (name, tag) to w, or, with fromTag, what of it differs from
// the snapshot fromTag. Package backup has the format.
func (s *Service) Backup(ctx context.Context, name, fromTag, tag string, w io.Writer, p Progress) error {
	if err := s.backup(ctx, name, fromTag, tag, w, p); err != nil {
		return explain(err, "backup of %q of %q", tag, name)
	}
	return nil
}

func (s *Service) backup(ctx context.Context, name, fromTag, tag string, w io.Writer, p Progress) error {
	if tag == "" {
		return fmt.Errorf("a backup is made of a snapshot: take one and name it: %w", ErrInvalid)
	}
	v, err := s.find(ctx, name, tag)
	if err != nil {
		return err
	}
	h := backup.Header{Name: name, Tag: v.Tag, Identity: v.Identity, Size: v.Size, ObjectSize: 1 << v.SizeShift, Taken: v.Snapped}
	if fromTag != "" {
		base, err := s.find(ctx, name, fromTag)
		if err != nil {
			return err
		}
		h.Base, h.BaseTag = base.Identity, tagOf(base)
	}
	vol, err := s.Open(ctx, name, tag, OpenOptions{ReadOnly: true, Client: "backup"})
	if err != nil {
		return err
	}
	defer vol.Close()
	out, err := backup.NewWriter(w, h)
	if err != nil {
		return err
	}
	buf := make([]byte, backupChunk)
	var failed error
	err = s.Diff(ctx, name, fromTag, tag, func(e Extent) bool {
		failed = backupExtent(ctx, vol, out, e, buf, fromTag != "")
		if failed == nil && p != nil {
			p(e.Off+e.Len, v.Size)
		}
		return failed == nil
	})
	if err = errors.Join(failed, err); err != nil {
		return err
	}
	if p != nil {
		p(v.Size, v.Size)
	}
	return out.Close()
}

// backupChunk is the most data in one record.
const backupChunk = 1 << 20

// backupExtent writes one extent. A full backup needs no zeros: it is restored into a
// new VDI.
func backupExtent(ctx context.Context, vol *Volume, out *backup.Writer, e Extent, buf []byte, zeros bool) error {
	if e.Zero {
		if !zeros {
			return nil
		}
		return out.Zero(e.Off, e.Len)
	}
	for end := e.Off + e.Len; e.Off < end; {
		p := buf[:min(int64(len(buf)), end-e.Off)]
		if _, err := vol.ReadAt(ctx, p, e.Off); err != nil {
			return err
		}
		if err := out.Data(e.Off, p); err != nil {
			return err
		}
		e.Off += int64(len(p))
	}
	return nil
}

// Restore reads what Backup wrote, into the VDI name, and takes the backup's snapshot
// there. A full backup makes the VDI. An incremental one needs it to have the base's
// snapshot, restored or not, and to be unchanged since. If a restore fails the VDI is as
// it was before.
func (s *Service) Restore(ctx context.Context, name string, r io.Reader, p Progress) (Info, error) {
	in, err := backup.NewReader(r)
	if err == nil && in.Header().Base == "" {
		return s.restoreFull(ctx, name, in, p)
	}
	if err == nil {
		return s.restoreIncrement(ctx, name, in, p)
	}
	return Info{}, explain(asKind(err), "restore VDI %q", name)
}

func asKind(err error) error {
	if errors.Is(err, backup.ErrFormat) {
		return &kindError{ErrInvalid, err}
	}
	return err
}

func (s *Service) restoreFull(ctx context.Context, name string, in *backup.Reader, p Progress) (Info, error) {
	h := in.Header()
	if h.ObjectSize <= 0 || h.ObjectSize&(h.ObjectSize-1) != 0 {
		return Info{}, fmt.Errorf("restore VDI %q: object size of %d bytes: %w", name, h.ObjectSize, ErrInvalid)
	}
	if _, err := s.Create(ctx, CreateOptions{Name: name, Size: h.Size, ObjectSizeShift: uint8(bits.TrailingZeros64(uint64(h.ObjectSize)))}); err != nil {
		return Info{}, explain(err, "restore")
	}
	i, err := s.fill(ctx, name, in, p)
	if err != nil {
		err = errors.Join(err, s.Delete(context.WithoutCancel(ctx), name, ""))
		return Info{}, explain(asKind(err), "restore VDI %q", name)
	}
	return i, nil
}

func (s *Service) restoreIncrement(ctx context.Context, name string, in *backup.Reader, p Progress) (Info, error) {
	base, err := s.findBase(ctx, name, in.Header())
	if err != nil {
		return Info{}, explain(err, "restore VDI %q", name)
	}
	i, err := s.resizeAndFill(ctx, name, in, p)
	if err != nil {
		_, undo := s.Rollback(context.WithoutCancel(ctx), name, tagOf(base))
		return Info{}, explain(asKind(errors.Join(err, undo)), "restore VDI %q", name)
	}
	return i, nil
}

func (s *Service) resizeAndFill(ctx context.Context, name string, in *backup.Reader, p Progress) (Info, error) {
	v, err := s.cfg.Catalog.Find(name, "")
	if err != nil {
		return Info{}, err
	}
	if size := in.Header().Size; size != v.Size {
		if _, err := s.Resize(ctx, name, size); err != nil {
			return Info{}, err
		}
	}
	return s.fill(ctx, name, in, p)
}

// findBase returns the snapshot that an increment is based on, if the VDI still is that.
func (s *Service) findBase(ctx context.Context, name string, h backup.Header) (catalog.VDI, error) {
	for _, v := range s.cfg.Catalog.Snapshots(name) {
		if v.Identity != h.Base {
			continue
		}
		now, err := s.cfg.Catalog.Find(name, "")
		if err != nil {
			return v, err
		}
		same := now.Size == v.Size
		if same {
			err = s.Diff(ctx, name, tagOf(v), "", func(Extent) bool { same = false; return false })
		}
		if err == nil && !same {
			err = fmt.Errorf("it was changed since snapshot %q, which the backup is based on: roll it back to that first: %w", tagOf(v), ErrInvalid)
		}
		return v, err
	}
	return catalog.VDI{}, fmt.Errorf("it has no snapshot with the identity %s (tag %q), which the backup is based on: restore that one first: %w",
		h.Base, h.BaseTag, ErrNotFound)
}

// fill carries out the records and takes the snapshot.
func (s *Service) fill(ctx context.Context, name string, in *backup.Reader, p Progress) (Info, error) {
	vol, err := s.Open(ctx, name, "", OpenOptions{Client: "restore"})
	if err != nil {
		return Info{}, err
	}
	defer vol.Close()
	h := in.Header()
	for {
		rec, err := in.Next()
		if err == io.EOF {
			break
		}
		if err == nil && rec.Data == nil {
			err = vol.Discard(ctx, rec.Off, rec.Len)
		} else if err == nil {
			_, err = vol.WriteAt(ctx, rec.Data, rec.Off)
		}
		if err != nil {
			return Info{}, err
		}
		if p != nil {
			p(rec.Off+rec.Len, h.Size)
		}
	}
	tag := h.Tag
	if v, err := s.cfg.Catalog.Find(name, ""); err == nil && catalog.CheckTag(tag, v.SnapshotID) != nil {
		tag = "" // a number that was the snapshot's own, and would be another's here
	}
	return s.snapshotAs(ctx, name, tag, h.Identity)
}
