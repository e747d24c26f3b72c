package integration

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// Groups, access rules and secrets, given through one gateway, hold on the other one at once; sessions of
// both are listed and ended through either.
func TestISCSIAccess(t *testing.T) {
	besideOthers(t)
	rig.Need(t, "iscsi-ls", "iscsi-inq", "iscsi-readcapacity16", "qemu-img", "qemu-io")
	secrets := t.TempDir()
	for name, text := range map[string]string{"joe": "correct-horse-battery\n", "us": "target staple-staple-staple\n", "short": "short\n"} {
		if err := os.WriteFile(filepath.Join(secrets, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f := rig.NewFlockOf(t, 2, 1, rig.FlockOptions{Config: "iscsi:\n  secrets: " + secrets + "\n"})
	one, two := f.Nodes[0], f.Nodes[1]
	one.Dog("vdi", "create", "vm1", "8M")
	one.Dog("vdi", "create", "vm2", "16M")
	one.Dog("vdi", "snapshot", "vm2", "-s", "then")
	portal := "iscsi://" + two.Host() + ":3260/"
	other := func(target string, lun string) string {
		return portal + rig.IQN + ":" + target + "/" + lun
	}
	// Portals of both gateways, whichever is asked.
	waitUntil(t, 20*time.Second, func() bool {
		out := rig.OK(t, "iscsi-ls", portal)
		return strings.Contains(out, two.Host()+":3260,2") && strings.Contains(out, one.Host()+":3260,1")
	})

	one.Dog("iscsi", "target", "create", "disks", "vm1", "vm2@then")
	one.Dog("iscsi", "target", "add", "disks", "vm2", "--lun", "7")
	f.Know("vm2")
	out := rig.OK(t, "iscsi-ls", "-s", portal)
	rig.Contains(t, out, "Target:"+rig.IQN+":disks")
	rig.Contains(t, rig.OK(t, "iscsi-readcapacity16", other("disks", "7")), "Total size:16777216")
	rig.Contains(t, rig.OK(t, "iscsi-readcapacity16", other("disks", "0")), "Total size:8388608")
	rig.OK(t, "qemu-io", "-f", "raw", "-c", "write -P 9 0 64k", "-c", "flush", other("disks", "7"))
	rig.OK(t, "qemu-io", "-f", "raw", "-r", "-c", "read -P 9 0 64k", one.ISCSI("vm2"))
	rig.Fails(t, "iscsi-inq", "-e", "1", "-c", "131", other("disks", "3"))

	// By name.
	const iqn = "iqn.2001-01.test:good"
	one.Dog("iscsi", "acl", "allow", "vm1", iqn)
	rig.OK(t, "iscsi-inq", "-i", iqn, other("vm1", "0"))
	rig.Fails(t, "iscsi-inq", "-i", "iqn.2001-01.test:bad", other("vm1", "0"))
	if out := rig.OK(t, "iscsi-ls", "-i", "iqn.2001-01.test:bad", portal); strings.Contains(out, ":vm1\n") || strings.Contains(out, ":vm1 ") {
		t.Errorf("who may not log in sees the target:\n%s", out)
	}
	// By network.
	two.Dog("iscsi", "acl", "allow", "vm1", "192.0.2.0/24")
	rig.Fails(t, "iscsi-inq", "-i", iqn, one.ISCSI("vm1"))
	two.Dog("iscsi", "acl", "allow", "vm1", "127.0.0.0/8")
	rig.OK(t, "iscsi-inq", "-i", iqn, one.ISCSI("vm1"))
	two.Dog("iscsi", "acl", "allow", "vm1", "--all")

	// By secret, one way and both.
	one.Dog("iscsi", "acl", "chap", "vm2", "joe", "--mutual", "us")
	with := func(user, secret string) string {
		return strings.Replace(other("vm2", "0"), "iscsi://", "iscsi://"+user+"%"+secret+"@", 1)
	}
	rig.OK(t, "iscsi-inq", with("joe", "correct-horse-battery"))
	rig.OK(t, "iscsi-inq", with("joe", "correct-horse-battery")+"?target_user=target&target_password=staple-staple-staple")
	rig.Fails(t, "iscsi-inq", with("joe", "correct-horse-battery")+"?target_user=target&target_password=wrong-staple-staple")
	rig.Fails(t, "iscsi-inq", with("joe", "wrong-horse-battery"))
	rig.Fails(t, "iscsi-inq", other("vm2", "0"))
	rig.OK(t, "iscsi-inq", other("vm1", "0"))
	one.Dog("iscsi", "acl", "chap", "vm2", "short", "--initiator", iqn)
	rig.Fails(t, "iscsi-inq", "-i", iqn, with("short", "short"))
	rig.Contains(t, two.Dog("iscsi", "target", "show", "vm2"), "joe and us", iqn+": short")
	for _, s := range f.Nodes {
		if log := s.Log(); strings.Contains(log, "correct-horse") || strings.Contains(log, "staple-staple") {
			t.Error("a secret is in the log")
		}
	}

	// Sessions of both gateways, and their end.
	client := exec.Command(rig.Tool("qemu-io"), "-f", "raw", "-r", other("vm1", "0"))
	client.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	commands, err := client.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	client.Stdout, client.Stderr = &said, &said
	if err := client.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Process.Kill() })
	io.WriteString(commands, "read 0 4k\n")
	waitUntil(t, 20*time.Second, func() bool { return strings.Contains(one.Dog("iscsi", "session", "list"), rig.IQN+":vm1") })
	var ended struct{ Sessions int }
	one.DogJSON(&ended, "iscsi", "session", "logout", "vm1")
	if ended.Sessions != 1 {
		t.Errorf("%d sessions are ended", ended.Sessions)
	}
	io.WriteString(commands, "read 4k 4k\n") // QEMU logs in again
	commands.Close()
	if err := client.Wait(); err != nil || strings.Count(said.String(), "read 4096/4096") != 2 {
		t.Errorf("qemu-io: %v\n%s", err, said.String())
	}
	waitUntil(t, 20*time.Second, func() bool { return !strings.Contains(one.Dog("iscsi", "session", "list"), rig.IQN+":vm1") })

	// What was said outlives the daemons.
	one.Dog("iscsi", "acl", "deny", "vm1", "--all")
	two.Stop()
	two.Start()
	rig.Fails(t, "iscsi-inq", other("vm1", "0"))
	one.Dog("iscsi", "target", "delete", "disks")
	rig.Fails(t, "iscsi-inq", other("disks", "0"))
}

// waitUntil waits until ok, and fails if that takes too long.
func waitUntil(t *testing.T, limit time.Duration, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit * patience()); !ok(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it does not happen within %v", limit)
		}
	}
}
