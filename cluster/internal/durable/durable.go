// Package durable keeps small files: what of the node's own directory a power cut must not take, nor leave
// half done. It knows nothing of what is in them.
package durable

import (
	"errors"
	"os"
	"path/filepath"
)

// WriteFile gives a file another content: after a power cut it has the old or the new one, and the new one once
// WriteFile has returned. Two calls for one path must not overlap.
func WriteFile(path, content string) error {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(content)
	if err == nil {
		err = f.Sync() // a name may become durable before what it names
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return Rename(path+".new", path)
}

// Rename gives a file or directory another name in its directory, in place of what had it, for good.
func Rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(to))
}

// SyncDir makes the names in a directory durable.
func SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
