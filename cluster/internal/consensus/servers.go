package consensus

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"

	"sheepdog/storage/object"
)

// ErrNotLeader is the answer to what only the leader does.
var ErrNotLeader = errors.New("this node does not lead the cluster")

// caughtUp is how many entries a server may lack and still be given a vote: it gets
// them while the change is agreed.
const caughtUp = 1024

// Member is what the cluster's state says of a node.
type Member struct {
	Node    string
	Zone    string
	Leaving bool // is to be removed from the raft
}

// Servers returns the members of the raft as this node knows them, by name. Health is
// what the leader thinks, and unknown elsewhere; zones are for the caller to know.
func (l *Log) Servers() []Server {
	servers, _ := l.servers()
	return servers
}

func (l *Log) servers() (list []Server, index uint64) {
	f := l.raft.GetConfiguration()
	for _, s := range f.Configuration().Servers {
		list = append(list, Server{Node: string(s.ID), Voter: s.Suffrage == raft.Voter, Health: l.healthOf(s.ID)})
	}
	slices.SortFunc(list, func(a, b Server) int { return cmp.Compare(a.Node, b.Node) })
	return list, f.Index()
}

func (l *Log) healthOf(id raft.ServerID) Health {
	leading, since := l.leads()
	switch {
	case !leading:
		return HealthUnknown
	case string(id) == l.cfg.Node:
		return HealthOK
	case l.net == nil:
		return HealthDown
	}
	c, ok := l.net.contact(id, l.raft.CurrentTerm())
	switch {
	case !ok && time.Since(since) < l.cfg.DownAfter:
		return HealthUnknown
	case !ok || time.Since(c.sent) > l.cfg.DownAfter:
		return HealthDown
	case c.lastLog+caughtUp < l.raft.LastIndex():
		return HealthBehind
	}
	return HealthOK
}

// Reconcile takes one step towards the right voters, see plan, and says which. The
// leader calls it whenever something has changed, and from time to time; on other nodes
// it fails with ErrNotLeader. Members that are not in the raft are ignored: they enter
// by Admit; servers that are no members keep what they have.
func (l *Log) Reconcile(ctx context.Context, members []Member) (Change, error) {
	if !l.Leading() {
		return Change{}, ErrNotLeader
	}
	servers, index := l.servers()
	for i := range servers {
		s := &servers[i]
		s.Zone = s.Node
		for _, m := range members {
			if m.Node == s.Node {
				s.Zone, s.Leaving = m.Zone, m.Leaving
			}
		}
	}
	c := plan(servers, l.cfg.Node)
	if err := l.carryOut(ctx, c, index); err != nil {
		return c, fmt.Errorf("%s %q in the raft: %w", c.Do, c.Node, l.leaderError(err))
	}
	return c, nil
}

// carryOut makes a change, if the members are still those of the given index.
func (l *Log) carryOut(ctx context.Context, c Change, index uint64) error {
	id, addr := raft.ServerID(c.Node), raft.ServerAddress(c.Node)
	var f raft.Future
	switch c.Do {
	case Nothing:
		return nil
	case Promote:
		f = l.raft.AddVoter(id, addr, index, enqueueTimeout)
	case Demote:
		f = l.raft.DemoteVoter(id, index, enqueueTimeout)
	case Remove:
		f = l.raft.RemoveServer(id, index, enqueueTimeout)
	case HandOver:
		f = l.raft.LeadershipTransferToServer(id, addr)
	}
	l.cfg.Logger.Info("change members of the raft", "change", string(c.Do), "node", c.Node, "reason", c.Why)
	_, err := l.await(ctx, f.Error)
	return err
}

// Admit lets a node into the raft, without a vote. The leader calls it for a node that
// starts; on others it fails with ErrNotLeader. fresh says that the node has no state:
// then an earlier server of that name is removed first, because it has forgotten what it
// promised. A fresh node must not run before that; then it begins with Prepare.
func (l *Log) Admit(ctx context.Context, node string, fresh bool) (err error) {
	defer wrap(&err, fmt.Sprintf("admit node %q to the raft", node))
	if !l.Leading() {
		return ErrNotLeader
	}
	if node == "" {
		return fmt.Errorf("it has no name: %w", object.ErrInvalid)
	}
	servers, index := l.servers()
	i := slices.IndexFunc(servers, func(s Server) bool { return s.Node == node })
	switch {
	case i >= 0 && !fresh:
		return nil
	case i >= 0 && node == l.cfg.Node:
		return fmt.Errorf("it is this one, which leads: another node must have the same name: %w", object.ErrInvalid)
	case i >= 0:
		if err := l.dismiss(ctx, servers, i, index); err != nil {
			return l.leaderError(err)
		}
	}
	l.cfg.Logger.Info("admit node to the raft", "node", node, "fresh", fresh)
	_, err = l.await(ctx, l.raft.AddNonvoter(raft.ServerID(node), raft.ServerAddress(node), 0, enqueueTimeout).Error)
	return l.leaderError(err)
}

// dismiss removes a server that has lost its state, if the others can decide without it.
func (l *Log) dismiss(ctx context.Context, servers []Server, i int, index uint64) error {
	voters, up := 0, 0
	for j, s := range servers {
		if s.Voter && j != i {
			voters++
			if s.Health != HealthDown {
				up++
			}
		}
	}
	if servers[i].Voter && up < quorum(voters) {
		return fmt.Errorf("%d of the %d other voters are up, which are too few to replace it: bring one of them back: %w", up, voters, object.ErrUnavailable)
	}
	return l.carryOut(ctx, Change{Remove, servers[i].Node, "it comes back without its state"}, index)
}

func (l *Log) leaderError(err error) error {
	if err != nil && retryable(err) {
		return fmt.Errorf("%w: %w", ErrNotLeader, err)
	}
	return err
}

// StepDown makes another voter the leader, one that answers and has the whole log. It
// returns nil if this node does not lead any more, or if nobody else could. It takes as
// long as an election at most.
func (l *Log) StepDown(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, l.cfg.Election)
	defer cancel()
	for _, s := range l.Servers() {
		if s.Voter && s.Node != l.cfg.Node && s.Health == HealthOK {
			_, err := l.await(ctx, l.raft.LeadershipTransferToServer(raft.ServerID(s.Node), raft.ServerAddress(s.Node)).Error)
			if err == nil || errors.Is(err, raft.ErrNotLeader) {
				return nil
			}
			return fmt.Errorf("hand the lead to node %q: %w", s.Node, err)
		}
	}
	return nil
}
