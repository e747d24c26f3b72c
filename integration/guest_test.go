package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// guestFlock is a cluster whose gateways a guest uses, with CHAP both ways.
func guestFlock(t *testing.T) *rig.Flock {
	t.Helper()
	dir := t.TempDir()
	for name, secret := range map[string]string{"a": "correct-horse-battery", "b": "staple-staple-staple"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(secret+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return rig.NewFlockOf(t, 3, 3, rig.FlockOptions{Config: fmt.Sprintf(
		"iscsi:\n  chap: {user: joe, secret_file: %s/a, mutual_user: target, mutual_secret_file: %[1]s/b}\n", dir)})
}

// guestHooks are what scripts in the guest have done to the cluster. Nodes are numbers from 1 on.
func guestHooks(t *testing.T, f *rig.Flock) rig.Hooks {
	node := func(args []string) *rig.Sheep {
		n, err := strconv.Atoi(args[0])
		if err != nil || n < 1 || n > len(f.Nodes) {
			t.Fatalf("the guest means node %q", args)
		}
		return f.Nodes[n-1]
	}
	alive := func() *rig.Sheep {
		for _, s := range f.Nodes {
			if s.Running() && s.DogRun("--timeout", "2s", "cluster", "info").Code == 0 {
				return s
			}
		}
		t.Fatal("no node answers")
		return nil
	}
	return rig.Hooks{
		"dog":    func(args []string) string { return alive().Dog(args...) },
		"kill":   func(args []string) string { node(args).Kill(); return "" },
		"stop":   func(args []string) string { node(args).Stop(); return "" },
		"freeze": func(args []string) string { node(args).Freeze(); return "" },
		"thaw":   func(args []string) string { node(args).Thaw(); return "" },
		"start":  func(args []string) string { node(args).Start(); return "" },
		"whole":  func([]string) string { f.WaitWhole(wholeLimit); return "" },
		// owner is the number of the node that owns a volume.
		"owner": func(args []string) string {
			var v struct{ Owner string }
			alive().DogJSON(&v, "vdi", "info", args[0])
			return strings.TrimPrefix(v.Owner, "n") + "\n"
		},
		// used is the space of a volume, in MiB.
		"used": func(args []string) string {
			var v struct{ Used int64 }
			alive().DogJSON(&v, "vdi", "info", args[0])
			return fmt.Sprintln(v.Used >> 20)
		},
	}
}

// guestScripts are the parts of a guest's script, by name, from testdata/guest, with the addresses of the nodes.
func guestScripts(t *testing.T, f *rig.Flock, names ...string) string {
	t.Helper()
	var b strings.Builder
	for i, s := range f.Nodes {
		fmt.Fprintf(&b, "N%d=%s\n", i+1, s.Host())
	}
	fmt.Fprintf(&b, "IQN=%s\n", rig.IQN)
	for _, name := range names {
		text, err := os.ReadFile(filepath.Join("testdata", "guest", name+".sh"))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s\nsay %s is done\n", text, name)
	}
	return b.String()
}

// The kernel's own clients in a real Linux guest. NBD: a file system is made, filled, trimmed, checked and
// found again, over one connection and over four. iSCSI: logins, reservations, resize, restarts of the gateway; then
// (in make soak) two gateways as paths of one disk.
func TestGuest(t *testing.T) {
	besideOthers(t)
	f := guestFlock(t)
	g := rig.NewGuest(t)
	for _, name := range []string{"vm1", "vm2", "mp"} {
		f.Nodes[0].Dog("vdi", "create", name, "128M")
		f.Know(name)
	}
	parts := []string{"nbd", "iscsi"}
	if soaking() {
		parts = append(parts, "multipath", "rolling")
	}
	out := g.Run(15*time.Minute, guestHooks(t, f), guestScripts(t, f, parts...))
	if testing.Verbose() {
		t.Log(out)
	}
	for _, s := range f.Nodes {
		noPanic(t, s)
	}
}
