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

func writeWhole(fsys disk.FS, name string, b []byte) error {
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
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := fsys.Rename(name+".tmp", name); err != nil {
		return err
	}
	return fsys.SyncDir(".")
}

// identify reads, checks and where need be writes the identity of a disk.
func identify(fsys disk.FS, node, cluster string) (*identity, error) {
	id, err := readIdentity(fsys)
	if err != nil {
		return nil, err
	}
	if id == nil {
		if err := refuseStrange(fsys); err != nil {
			return nil, err
		}
		var b [8]byte
		if _, err := rand.Read(b[:]); err != nil {
			return nil, fmt.Errorf("make disk id: %w", err)
		}
		id = &identity{Format: identityFormat, Cluster: cluster, Node: node, Disk: hex.EncodeToString(b[:])}
		return id, writeIdentity(fsys, id)
	}
	if id.Clearing {
		return nil, refuse(`disk %s was being emptied, and that was interrupted: take it out of node.disks, and use "dog node md plug --empty"`, fsys)
	}
	changed, err := id.adopt(fsys, node, cluster)
	if err != nil || !changed {
		return id, err
	}
	return id, writeIdentity(fsys, id)
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
