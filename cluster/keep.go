package cluster

import (
	"errors"
	"os"
	"path/filepath"
)

// keepFile gives a file in the node's directory another content: after a power cut it has the
// old or the new one. Some of what a node needs before it can ask others is kept like this.
func (n *Node) keepFile(name, content string) error {
	path := filepath.Join(n.cfg.Dir, name)
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
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	dir, err := os.Open(n.cfg.Dir)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
