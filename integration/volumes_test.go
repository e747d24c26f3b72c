package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"sheepdog/integration/client"
	"sheepdog/integration/rig"
)

func port(s *rig.Sheep) string { return strconv.Itoa(s.NBDPort) }

// mustWrite and mustRead use the sheep's NBD port with one connection per call, as new clients would.
func mustWrite(t *testing.T, s *rig.Sheep, export string, off uint64, p []byte) {
	t.Helper()
	c := s.Dial(export)
	defer c.Close()
	if err := c.Write(p, off, client.FlagFUA); err != nil {
		t.Fatalf("write %s at %d: %v", export, off, err)
	}
}

// maxRead is the longest read that NBD servers take.
const maxRead = 32 << 20

func mustRead(t *testing.T, s *rig.Sheep, export string, off uint64, want []byte) {
	t.Helper()
	c := s.Dial(export)
	defer c.Close()
	got := make([]byte, len(want))
	for at := 0; at < len(got); at += maxRead {
		if err := c.Read(got[at:min(at+maxRead, len(got))], off+uint64(at)); err != nil {
			t.Fatalf("read %s at %d: %v", export, off, err)
		}
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%s at %d: other content than expected", export, off)
	}
}

// A family of a volume: snapshots, clones of them, a rollback, resizing, and deletion in an order in which parents
// go before children; each member keeps its own content throughout.
func TestSnapshotsAndClones(t *testing.T) {
	s := rig.Start(t, rig.Options{Config: "storage: {checkpoint: 1s}\n"})
	a, b, c, d := rig.Random(1, 9<<20), rig.Random(2, 9<<20), rig.Random(3, 9<<20), rig.Random(4, 9<<20)
	s.Dog("vdi", "create", "vm", "64M")
	mustWrite(t, s, "vm", 1<<20, a)
	s.Dog("vdi", "snapshot", "vm", "-s", "one")
	mustWrite(t, s, "vm", 1<<20, b)
	s.Dog("vdi", "snapshot", "vm", "-s", "two")
	mustWrite(t, s, "vm", 1<<20, c)
	s.Dog("vdi", "clone", "vm", "copy", "-s", "one")
	mustWrite(t, s, "copy", 3<<20, d[:1000])

	cloned := append([]byte(nil), a...)
	copy(cloned[2<<20:], d[:1000])
	all := func(when string) {
		t.Helper()
		mustRead(t, s, "vm", 1<<20, c)
		mustRead(t, s, "copy", 1<<20, cloned)
		mustRead(t, s, "copy", 10<<20, make([]byte, 1<<20))
		if t.Failed() {
			t.Fatal(when)
		}
	}
	all("after cloning")
	mustRead(t, s, "vm@one", 1<<20, a)
	mustRead(t, s, "vm@two", 1<<20, b)
	for _, name := range []string{"one", "two", "copy"} {
		rig.Contains(t, s.Dog("vdi", "tree"), name)
	}

	s.Stop()
	s.Start()
	all("after a restart")
	mustRead(t, s, "vm@one", 1<<20, a)

	s.Dog("vdi", "delete", "vm", "-s", "one") // the parent of copy
	all("after deleting the first snapshot")
	mustRead(t, s, "vm@two", 1<<20, b)

	s.Dog("vdi", "rollback", "vm", "-s", "two")
	mustRead(t, s, "vm", 1<<20, b)
	mustRead(t, s, "copy", 1<<20, cloned)

	s.Dog("vdi", "delete", "vm")
	s.Dog("vdi", "delete", "vm", "-s", "two")
	mustRead(t, s, "copy", 1<<20, cloned)
	s.Dog("vdi", "check", "copy")

	s.Dog("vdi", "delete", "copy")
	eventually(t, 30*time.Second, "the space of deleted volumes comes back", func() error {
		if used := rig.ObjectUsage(t, s.Disks[0]); used > 1<<20 {
			return fmt.Errorf("%d bytes are still used", used)
		}
		return nil
	})
}

// New sizes show on new connections; a shrunk volume has lost what was beyond, also when it grows again.
func TestResize(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm", "16M")
	mustWrite(t, s, "vm", 15<<20, rig.Random(1, 1<<20))
	old := s.Dial("vm")
	s.Dog("vdi", "resize", "vm", "64M")
	if c := s.Dial("vm"); c.Size != 64<<20 {
		t.Errorf("size after growing: %d", c.Size)
	}
	mustRead(t, s, "vm", 15<<20, rig.Random(1, 1<<20))
	mustRead(t, s, "vm", 63<<20, make([]byte, 1<<20))
	if err := old.Read(make([]byte, 512), 0); err != nil {
		t.Errorf("a session from before: %v", err)
	}
	s.Dog("vdi", "resize", "vm", "8M")
	if c := s.Dial("vm"); c.Size != 8<<20 {
		t.Errorf("size after shrinking: %d", c.Size)
	}
	if err := old.Read(make([]byte, 512), 15<<20); err == nil {
		t.Error("a session from before reads beyond the new end")
	}
	s.Dog("vdi", "resize", "vm", "16M")
	mustRead(t, s, "vm", 15<<20, make([]byte, 1<<20))
}

// Content in and out through dog: what NBD shows is the same.
func TestDogData(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	data := rig.Random(1, 10<<20)
	image := rig.File(t, "image", data)
	out := filepath.Join(t.TempDir(), "out")
	s.Dog("vdi", "import", "vm", image)
	mustRead(t, s, "vm", 0, data)
	s.Dog("vdi", "export", "vm", out)
	same(t, image, out)
	// A second import of that name is refused, with the reason, and changes nothing.
	if r := s.DogRun("vdi", "import", "vm", rig.File(t, "other", rig.Random(2, 64<<20))); r.Code != 1 || !strings.Contains(r.Stderr, "already") || strings.Contains(r.Stderr, "incomplete") {
		t.Errorf("import onto a VDI that is there: status %d\n%s", r.Code, r.Stderr)
	}
	// So is more than fits, while dog is still sending.
	s.Dog("vdi", "create", "small", "1M")
	for range 5 {
		if r := s.DogRun("vdi", "import", "small", "--overwrite", rig.File(t, "other", rig.Random(2, 64<<20))); r.Code != 1 || !strings.Contains(r.Stderr, "beyond the end") {
			t.Errorf("import of too much: status %d\n%s", r.Code, r.Stderr)
		}
	}
	mustRead(t, s, "vm", 0, data)
	if r := s.DogInput("hello", "vdi", "write", "vm", "4097", "5"); r.Code != 0 {
		t.Fatal(r.Stderr)
	}
	if got := s.Dog("vdi", "read", "vm", "4096", "7"); got != string(data[4096:4097])+"hello"+string(data[4102:4103]) {
		t.Errorf("read back %q", got)
	}
	s.Dog("vdi", "setattr", "vm", "color", "blue")
	if got := s.Dog("vdi", "getattr", "vm", "color"); strings.TrimSpace(got) != "blue" {
		t.Errorf("attribute: %q", got)
	}
}

// Incremental backup moves what changed, and restore rebuilds the volume.
func TestBackup(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	dir := t.TempDir()
	s.Dog("vdi", "create", "vm", "64M")
	mustWrite(t, s, "vm", 0, rig.Random(1, 20<<20))
	s.Dog("vdi", "snapshot", "vm", "-s", "a")
	mustWrite(t, s, "vm", 5<<20, rig.Random(2, 4096))
	s.Dog("vdi", "snapshot", "vm", "-s", "b")
	full, inc := filepath.Join(dir, "full"), filepath.Join(dir, "inc")
	s.Dog("vdi", "backup", "vm", "-s", "a", full)
	s.Dog("vdi", "backup", "vm", "-s", "b", "-F", "a", inc)
	if info, err := os.Stat(inc); err != nil || info.Size() > 1<<20 {
		t.Errorf("incremental backup of 4 KiB: %v, %v", info, err)
	}
	s.Dog("vdi", "restore", "new", full)
	s.Dog("vdi", "restore", "new", inc)
	a, b := filepath.Join(dir, "va"), filepath.Join(dir, "vb")
	s.Dog("vdi", "export", "vm", a)
	s.Dog("vdi", "export", "new", b)
	same(t, a, b)
}

// Exit statuses: 0 done, 1 failed, 2 wrong usage; and messages say what is wrong.
func TestDogExitCodes(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm", "64M")
	for _, c := range []struct {
		args string
		code int
		says string
	}{
		{"vdi list", 0, "vm"},
		{"-o json vdi list", 0, `"vm"`},
		{"-o yaml vdi list", 0, "vm"},
		{"-r vdi list", 0, "vm"},
		{"vdi info vm", 0, "vm"},
		{"node list", 0, "n1"},
		{"node info", 0, ""},
		{"cluster info", 0, ""},
		{"version", 0, ""},
		{"help", 0, "vdi"},
		{"vdi create vm 64M", 1, "vm"},
		{"vdi delete nosuch", 1, "nosuch"},
		{"vdi snapshot vm -s", 2, ""},
		{"vdi create", 2, ""},
		{"vdi create x 12Q", 2, "12Q"},
		{"vdi nosuchcommand", 2, "nosuchcommand"},
		{"nosuchcommand", 2, "nosuchcommand"},
		{"vdi list --nosuchflag", 2, "nosuchflag"},
		{"-o xml vdi list", 2, "xml"},
		{"cluster format -c 1", 1, ""},
	} {
		r := s.DogRun(strings.Fields(c.args)...)
		if r.Code != c.code {
			t.Errorf("dog %s: status %d, want %d\n%s%s", c.args, r.Code, c.code, r.Stdout, r.Stderr)
		}
		if !strings.Contains(r.Stdout+r.Stderr, c.says) {
			t.Errorf("dog %s does not say %q:\n%s%s", c.args, c.says, r.Stdout, r.Stderr)
		}
	}
	s.Stop()
	if r := s.DogRun("vdi", "list"); r.Code != 1 || !strings.Contains(r.Stderr, s.Admin()) {
		t.Errorf("dog without a daemon: status %d\n%s", r.Code, r.Stderr)
	}
}

// A daemon that cannot understand its configuration does not start, and names the key.
func TestConfigurationErrors(t *testing.T) {
	for name, c := range map[string]struct{ config, says string }{
		"unknown key":     {"storag:\n  x: 1\n", "storag"},
		"unknown subkey":  {"storage:\n  lgo_limit: 64M\n", "lgo_limit"},
		"not a size":      {"storage:\n  log_limit: many\n", "log_limit"},
		"not a list":      {"cluster:\n  join: {a: b}\n", "join"},
		"not YAML":        {"storage: [\n", "yaml"},
		"unknown network": {"storage:\n  log_limit: -1\n", "log_limit"},
	} {
		t.Run(name, func(t *testing.T) {
			s := rig.New(t, rig.Options{Config: c.config})
			s.Launch()
			if code := s.Wait(endLimit); code != 1 && code != 2 {
				t.Errorf("status %d", code)
			}
			if !strings.Contains(strings.ToLower(s.Log()), c.says) {
				t.Errorf("does not name %s:\n%s", c.says, s.Log())
			}
		})
	}
}

// An unformatted daemon says what to do.
func TestUnformatted(t *testing.T) {
	s := rig.Start(t, rig.Options{Raw: true})
	r := s.DogRun("vdi", "create", "vm", "1G")
	if r.Code != 1 {
		t.Errorf("create without format: status %d", r.Code)
	}
	rig.Contains(t, r.Stderr, "dog cluster format")
	s.Dog("cluster", "format", "-c", "1")
	s.Dog("vdi", "create", "vm", "1G")
}
