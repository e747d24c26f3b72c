package integration

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// awaitLog waits until a daemon's log has a line with all these words.
func awaitLog(t *testing.T, s *rig.Sheep, words ...string) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second * patience()); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		for line := range strings.Lines(s.Log()) {
			all := true
			for _, w := range words {
				all = all && strings.Contains(line, w)
			}
			if all {
				return
			}
		}
	}
	t.Errorf("the log of %s does not say %q", s.Host(), words)
}

// Who has another secret, is of another cluster, or is no sheep at all, is refused: both sides say why, and
// nothing else happens to the cluster. Who has the disks of another cluster does not even start.
func TestFlockRefusesStrangers(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlock(t, 2, 2)
	h := newHerder(t, f, "v")
	h.start(f.Nodes[0])
	n1 := f.Nodes[0]

	other := f.Stranger(7, "another secret, which is long enough")
	other.Start()
	awaitLog(t, other, "refuse peer", n1.Host(), "it has another secret")
	awaitLog(t, n1, "refuse peer", other.Host(), "it has another secret")

	// The same secret, and a cluster of its own, before it hears of this one.
	away := f.Stranger(8, rig.Secret)
	moved := away.Join("127.0.0.1:1")
	away.Start()
	away.Dog("cluster", "format", "-c", "1")
	away.Stop()
	away.Join(moved)
	away.Start()
	awaitLog(t, away, "refuse peer", n1.Host(), "it belongs to cluster", "this node to cluster")
	awaitLog(t, n1, "refuse peer", away.Host(), "it belongs to cluster", "this node to cluster")
	away.Stop()

	// The disk of that one, in a node without its state.
	lost := f.Stranger(9, rig.Secret)
	if err := os.Rename(filepath.Join(away.Disks[0], "sheep.json"), filepath.Join(lost.Disks[0], "sheep.json")); err != nil {
		t.Fatal(err)
	}
	lost.Launch()
	if code := lost.Wait(endLimit); code == 0 || !strings.Contains(lost.Log(), "belong") {
		t.Errorf("a node with a disk of another cluster ended with status %d\n%s", code, lost.Log())
	}

	conn, err := net.Dial("tcp", net.JoinHostPort(n1.Host(), "7001"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.Write([]byte("GET / HTTP/1.0\r\n\r\n"))
	conn.SetReadDeadline(time.Now().Add(30 * time.Second * patience()))
	if _, err := io.Copy(io.Discard, conn); err != nil && strings.Contains(err.Error(), "timeout") {
		t.Errorf("who speaks something else on the peer port is kept: %v", err)
	}
	awaitLog(t, n1, "connection refused: not a node of this cluster")

	h.end()
	f.WaitWhole(wholeLimit)
	if m := f.Members(n1); len(m) != 2 {
		t.Errorf("the cluster has nodes %v", m)
	}
	for _, s := range f.Nodes {
		h.verify(s, false)
	}
}
