package storage

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"sheepdog/storage/disk"
	"sheepdog/storage/object"
)

const (
	identityName   = "sheep.json"
	identityFormat = 1
	// maxIdentityBytes bounds what is read of a sheep.json.
	maxIdentityBytes = 64 << 10
)

// identity is the content of sheep.json.
type identity struct {
	Format  int    `json:"format"`
	Cluster string `json:"cluster,omitempty"`
	Node    string `json:"node"`
	Disk    string `json:"disk"`
	// Disks are the ids of all disks of the node when it was opened last.
	Disks []string `json:"disks,omitempty"`
	// Clearing: what is on the disk is being removed, see Store.Reuse.
	Clearing bool `json:"clearing,omitempty"`
	// Leaving: the disk is to be taken out, see Store.Retire. What another disk of the node has too
	// has left it for that one.
	Leaving bool `json:"leaving,omitempty"`
	// Filling: the disk came when others had something, and takes its share of that.
	Filling bool `json:"filling,omitempty"`
}

// readIdentity returns nil if there is none.
func readIdentity(fsys disk.FS) (*identity, error) {
	f, err := fsys.OpenFile(identityName, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open %s/%s: %w", fsys, identityName, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, maxIdentityBytes))
	if err != nil {
		return nil, fmt.Errorf("read %s/%s: %w", fsys, identityName, err)
	}
	id := new(identity)
	if err := json.Unmarshal(b, id); err != nil {
		return nil, fmt.Errorf("read %s/%s: %w: restore the file or remove the disk from node.disks", fsys, identityName, err)
	}
	if id.Format != identityFormat {
		return nil, fmt.Errorf("read %s/%s: format %d is not known to this version (%d): use a newer sheep", fsys, identityName, id.Format, identityFormat)
	}
	if id.Disk == "" {
		return nil, fmt.Errorf("read %s/%s: no disk id: restore the file or remove the disk from node.disks", fsys, identityName)
	}
	return id, nil
}

// writeIdentity replaces sheep.json durably: after a crash it is the old or the new one.
func writeIdentity(fsys disk.FS, id *identity) error {
	b, err := json.MarshalIndent(id, "", "  ")
	if err != nil {
		return err
	}
	if err := writeWhole(fsys, identityName, append(b, '\n')); err != nil {
		return fmt.Errorf("write %s/%s: %w", fsys, identityName, err)
	}
	return nil
}

// writeWhole replaces a file durably.
func writeWhole(fsys disk.FS, name string, b []byte) error {
	if err := stageWhole(fsys, name, b); err != nil {
		return err
	}
	return commitWhole(fsys, name)
}

// stageWhole prepares the new content of a file, durably, so that commitWhole takes little time.
func stageWhole(fsys disk.FS, name string, b []byte) error {
	f, err := fsys.OpenFile(name+".tmp", disk.Create)
	if err != nil {
		return err
	}
	if err = f.Truncate(0); err == nil {
		_, err = f.WriteAt(b, 0)
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// commitWhole has the file be what stageWhole has prepared. If a drive's fails for want of space nothing has changed, see
// certain; of any other failure it is not known what a crash would leave.
func commitWhole(fsys disk.FS, name string) error {
	if err := fsys.Rename(name+".tmp", name); err != nil {
		return err
	}
	return fsys.SyncDir(".")
}

// identify reads, checks and where need be writes the identity of a disk; fresh says that it had none.
func identify(fsys disk.FS, node, cluster string) (id *identity, fresh bool, err error) {
	id, err = readIdentity(fsys)
	if err != nil {
		return nil, false, err
	}
	if id == nil {
		if err := refuseStrange(fsys); err != nil {
			return nil, false, err
		}
		var b [8]byte
		if _, err := rand.Read(b[:]); err != nil {
			return nil, false, fmt.Errorf("make disk id: %w", err)
		}
		id = &identity{Format: identityFormat, Cluster: cluster, Node: node, Disk: hex.EncodeToString(b[:])}
		return id, true, writeIdentity(fsys, id)
	}
	if id.Clearing {
		return nil, false, refuse(`disk %s was being emptied, and that was interrupted: take it out of node.disks, and use "dog node md plug --empty"`, fsys)
	}
	changed, err := id.adopt(fsys, node, cluster)
	if err != nil || !changed {
		return id, false, err
	}
	return id, false, writeIdentity(fsys, id)
}

// become replaces what a disk says of itself, durably. The caller holds Store.idMu once the disk is in use.
func (d *drive) become(id identity) error {
	if err := writeIdentity(d.fs, &id); err != nil {
		return err
	}
	d.id = &id
	return nil
}

// adopt fills in what the identity lacks and refuses what contradicts it.
func (id *identity) adopt(fsys disk.FS, node, cluster string) (changed bool, err error) {
	if id.Node != "" && node != "" && id.Node != node {
		return false, refuse("disk %s belongs to node %q, not to %q: check node.name and node.disks", fsys, id.Node, node)
	}
	if id.Cluster != "" && cluster != "" && id.Cluster != cluster {
		return false, refuse("disk %s belongs to cluster %s, not to %s: use an empty disk", fsys, id.Cluster, cluster)
	}
	if id.Node == "" && node != "" {
		id.Node, changed = node, true
	}
	if id.Cluster == "" && cluster != "" {
		id.Cluster, changed = cluster, true
	}
	return changed, nil
}

// refuseStrange keeps a disk whose identity was lost from being taken for an empty one.
func refuseStrange(fsys disk.FS) error {
	names, err := fsys.ReadDir(objectsDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list %s/%s: %w", fsys, objectsDir, err)
	}
	if len(names) > 0 {
		return refuse("disk %s has objects but no %s: restore the file", fsys, identityName)
	}
	return nil
}

// refusal of disks that do not belong together or here: object.ErrInvalid to programs,
// its own words to people.
type refusal string

func refuse(format string, args ...any) error { return refusal(fmt.Sprintf(format, args...)) }

func (r refusal) Error() string      { return string(r) }
func (refusal) Is(target error) bool { return target == object.ErrInvalid }
