package members

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/serf/serf"
)

// maxRefusals bounds what is remembered of peers that were refused; those beyond are
// refused in silence.
const maxRefusals = 1024

// refusals logs each refused peer once for each reason, and remembers which members have
// become strangers.
type refusals struct {
	log *slog.Logger

	mu     sync.Mutex
	logged map[string]bool // peer and reason
	gone   map[string]bool // names of members that have become strangers
}

func newRefusals(log *slog.Logger) *refusals {
	return &refusals{log: log, logged: map[string]bool{}, gone: map[string]bool{}}
}

func (r *refusals) warn(peer, reason, hint string) {
	key := peer + "\x00" + reason
	r.mu.Lock()
	known := r.logged[key] || len(r.logged) >= maxRefusals
	if !known {
		r.logged[key] = true
	}
	r.mu.Unlock()
	if !known {
		r.log.Warn("refuse peer", "peer", peer, "reason", reason, "hint", hint)
	}
}

func (r *refusals) turned(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.gone) < maxRefusals {
		r.gone[name] = true
	}
}

func (r *refusals) returned(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.gone, name)
}

func (r *refusals) strange(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.gone[name]
}

const (
	hintSecret  = "give all nodes of a cluster the same secret"
	hintCluster = "a node is in one cluster only: use empty disks and an empty state directory to move it"
	hintName    = "give each node a name of its own"
)

// doorman is asked by memberlist who may come in. In place of serf's own delegate for
// this: that one is not told who is alive, and a dead stranger must not keep others out.
type doorman struct{ m *Members }

// NotifyMerge implements memberlist.MergeDelegate: it is asked about all members of
// another group, by both groups, before they become one.
func (d doorman) NotifyMerge(peers []*memberlist.Node) error {
	select {
	case <-d.m.created:
	default:
		return errors.New("the node is still starting")
	}
	known := map[string]string{} // address of members that are alive
	for _, member := range d.m.serf.Members() {
		if member.Status == serf.StatusAlive && !d.m.refused.strange(member.Name) {
			known[member.Name] = hostPort(member.Addr, member.Port)
		}
	}
	group := ""
	for _, p := range peers {
		if p.State != memberlist.StateAlive && p.State != memberlist.StateSuspect {
			continue
		}
		cluster, err := d.m.admissible(p)
		if err != nil {
			return err
		}
		group = cmp.Or(group, cluster)
		if at := hostPort(p.Addr, p.Port); known[p.Name] != "" && known[p.Name] != at {
			d.m.refused.warn(p.Name+" at "+at, fmt.Sprintf("the name belongs to the node at %s", known[p.Name]), hintName)
			return fmt.Errorf("the name of node %q at %s belongs to the node at %s", p.Name, at, known[p.Name])
		}
	}
	if group != "" {
		d.m.setGroup(group)
	}
	return nil
}

// NotifyAlive implements memberlist.AliveDelegate: it is asked about each sign of life
// that comes by gossip, with memberlist's lock held.
func (d doorman) NotifyAlive(p *memberlist.Node) error {
	if p.Name == d.m.cfg.Name {
		at, own := hostPort(p.Addr, p.Port), d.m.address.Load()
		if own != nil && at != *own {
			d.m.refused.warn(p.Name+" at "+at, "it has the name of this node", hintName)
			return errors.New("it has the name of this node")
		}
		return nil
	}
	cluster, err := d.m.admissible(p)
	if err != nil {
		d.m.refused.turned(p.Name)
		d.m.signal()
		return err
	}
	d.m.refused.returned(p.Name)
	if cluster != "" {
		d.m.setGroup(cluster)
	}
	return nil
}

// admissible returns the cluster of a peer, or why the peer is not let in. A node that is in
// no cluster yet belongs to any; it may go with the nodes of one only.
func (m *Members) admissible(p *memberlist.Node) (string, error) {
	theirs, err := clusterOf(p.Meta)
	if err != nil {
		return "", err
	}
	ours := m.cluster()
	if ours == "" || theirs == "" || ours == theirs {
		return theirs, nil
	}
	m.refused.warn(p.Name+" at "+hostPort(p.Addr, p.Port), fmt.Sprintf("it belongs to cluster %s, this node to cluster %s", theirs, ours), hintCluster)
	return "", fmt.Errorf("node %q belongs to cluster %s, not to %s", p.Name, theirs, ours)
}

func hostPort(ip net.IP, port uint16) string {
	return net.JoinHostPort(ip.String(), strconv.Itoa(int(port)))
}

// secretTexts are how memberlist says that a peer has another secret, or none. It has no
// errors for this; a test checks that it still says so.
var secretTexts = []struct{ part, reason string }{
	{"no installed keys could decrypt", "it has another secret"},
	{"remote state is encrypted and encryption is not configured", "it has a secret, this node has none"},
	{"encryption is configured but remote state is not encrypted", "it has no secret"},
}

// refusedSecret looks in a text of memberlist for signs of another secret. peer is whom
// the text is about, "" if it says so itself.
func (m *Members) refusedSecret(peer, text string) {
	for _, t := range secretTexts {
		if !strings.Contains(text, t.part) {
			continue
		}
		if peer == "" {
			peer = fromAddress(text)
		}
		if peer != "" {
			m.refused.warn(peer, t.reason, hintSecret)
		}
		return
	}
}

var fromText = regexp.MustCompile(`from=(\S+)`)

// fromAddress is the host in a message of memberlist, without the port: that changes with
// every connection.
func fromAddress(text string) string {
	found := fromText.FindStringSubmatch(text)
	if found == nil {
		return ""
	}
	if host, _, err := net.SplitHostPort(found[1]); err == nil {
		return host
	}
	return found[1]
}
