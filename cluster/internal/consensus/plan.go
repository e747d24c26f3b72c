package consensus

import (
	"cmp"
	"slices"
)

// maxVoters is how many nodes vote at most: five stand the loss of two, and each more
// makes every decision slower.
const maxVoters = 5

// Health is what the leader knows of a server.
type Health int

// What the leader may know of a server.
const (
	HealthUnknown Health = iota // leading for too short a time to tell
	HealthDown                  // silent for longer than Config.DownAfter
	HealthBehind                // answers, and does not have the whole log yet
	HealthOK
)

// Server is a member of the raft, as plan sees it.
type Server struct {
	Node    string
	Zone    string // failure domain
	Voter   bool
	Leaving bool // is to be removed from the raft
	Health  Health
}

// Action is a kind of Change.
type Action string

// What can be done to a raft's membership.
const (
	Nothing  Action = ""
	Promote  Action = "promote"   // a follower begins to vote
	Demote   Action = "demote"    // a voter becomes a follower
	Remove   Action = "remove"    // a follower leaves the raft
	HandOver Action = "hand over" // the node shall lead in place of the present leader
)

// Change is one step from the servers there are to those there shall be.
type Change struct {
	Do   Action
	Node string
	Why  string
}

// plan chooses the next change of a raft's membership; with the same servers it comes
// to the same answer. Carried out one after the other, its changes come to an end.
//
// The servers that vote are an odd number, up to five, spread over zones as far as
// possible. Of two servers, one votes: with two voters the loss of either node would
// stop the cluster, with one only the loss of that node does, and neither is able to
// go on alone after the loss of a disk without somebody's decision. The price is that
// the other node's copy of the log may be some milliseconds old.
//
// Except when a server is asked to leave, no change lowers the number of voters that
// may still be lost, because:
//   - a voter that is down is demoted before its place is taken. The quorum of 4 is that
//     of 5, so nothing is lost on the way; the other order would need the newcomer at once.
//   - a voter that is up is replaced in the opposite order.
//   - fewer than three voters are never left behind because servers are down: only because
//     there are fewer servers.
func plan(servers []Server, leader string) Change {
	p := survey(servers, leader)
	for _, rule := range []func(*picture) (Change, bool){
		(*picture).leaderLeaves, (*picture).othersLeave, (*picture).even, (*picture).replace, (*picture).grow, (*picture).spread,
	} {
		if c, ok := rule(&p); ok {
			return c
		}
	}
	return Change{}
}

// picture is what the rules of plan look at.
type picture struct {
	leader  string
	servers []Server // by name
	voters  int
	up      int            // voters that are not known to be down
	inZone  map[string]int // voters that are up, by zone
	spares  []Server       // that could vote at once; the best one first
	pending int            // servers that may become spares soon
	want    int            // voters, if there are enough spares
}

func survey(servers []Server, leader string) picture {
	p := picture{leader: leader, servers: slices.Clone(servers), inZone: map[string]int{}}
	slices.SortFunc(p.servers, func(a, b Server) int { return cmp.Compare(a.Node, b.Node) })
	staying := 0
	for _, s := range p.servers {
		if !s.Leaving {
			staying++
		}
		switch {
		case s.Voter:
			p.voters++
			if s.Health != HealthDown {
				p.up++
				p.inZone[s.Zone]++
			}
		case s.Leaving:
		case s.Health == HealthOK:
			p.spares = append(p.spares, s)
		case s.Health != HealthDown:
			p.pending++
		}
	}
	slices.SortStableFunc(p.spares, func(a, b Server) int { return cmp.Compare(p.inZone[a.Zone], p.inZone[b.Zone]) })
	p.want = Voters(staying)
	return p
}

// Voters is how many of some servers vote, if all are well.
func Voters(servers int) int {
	n := min(servers, maxVoters)
	if n > 0 && n%2 == 0 {
		n--
	}
	return n
}

func quorum(voters int) int { return voters/2 + 1 }

func (p *picture) leaderLeaves() (Change, bool) {
	i := slices.IndexFunc(p.servers, func(s Server) bool { return s.Node == p.leader && s.Leaving })
	if i < 0 {
		return Change{}, false
	}
	for _, s := range p.servers {
		if s.Voter && !s.Leaving && s.Health == HealthOK {
			return Change{HandOver, s.Node, "the leader is to leave"}, true
		}
	}
	return p.promote("the leader is to leave, and nobody else votes")
}

// othersLeave lets servers go, voters as soon as others vote in their place.
func (p *picture) othersLeave() (Change, bool) {
	for _, s := range p.servers {
		if s.Leaving && !s.Voter {
			return Change{Remove, s.Node, "it is to leave"}, true
		}
	}
	for _, s := range p.servers {
		if !s.Leaving || s.Node == p.leader {
			continue
		}
		if s.Health == HealthDown {
			return p.demoteIfSafe(s, "it is down and to leave")
		}
		if len(p.spares) > 0 && p.voters%2 == 1 {
			return p.promote("another voter is to leave")
		}
		return p.demoteIfSafe(s, "it is to leave")
	}
	return Change{}, false
}

func (p *picture) demoteIfSafe(s Server, why string) (Change, bool) {
	up := p.up
	if s.Health != HealthDown {
		up--
	}
	if up < quorum(p.voters-1) {
		return Change{}, false
	}
	return Change{Demote, s.Node, why}, true
}

func (p *picture) promote(why string) (Change, bool) {
	if len(p.spares) == 0 {
		return Change{}, false
	}
	return Change{Promote, p.spares[0].Node, why}, true
}

// even brings an even number of voters to an odd one: a change before it was half of
// something, or servers have left.
func (p *picture) even() (Change, bool) {
	if p.voters%2 == 1 {
		return Change{}, false
	}
	if p.up < p.voters {
		return p.demote("it is down, and one voter is too many")
	}
	if p.voters < p.want {
		if len(p.spares) > 0 {
			return p.promote("the number of voters should be odd")
		}
		if p.pending > 0 || p.voters == 2 {
			return Change{}, true // wait for a third one
		}
	}
	return p.demote("the number of voters should be odd")
}

// replace takes the vote from servers that are down, if that helps.
func (p *picture) replace() (Change, bool) {
	if p.up == p.voters {
		return Change{}, false
	}
	if len(p.spares) > 0 {
		return p.demote("it is down, and another server takes its place")
	}
	// With nobody to take the place, the smaller number is better if all of it is up:
	// three of five may lose none, three of three may lose one.
	if p.pending == 0 && p.up >= 3 && p.up%2 == 1 {
		return p.demote("it is down, and those that are up are enough")
	}
	return Change{}, true
}

// grow adds two voters, one after the other.
func (p *picture) grow() (Change, bool) {
	if p.voters+2 > p.want || len(p.spares) < 2 {
		return Change{}, false
	}
	return p.promote("there are enough servers for more voters")
}

// spread moves a vote to a zone that has fewer.
func (p *picture) spread() (Change, bool) {
	if len(p.spares) == 0 {
		return Change{}, false
	}
	most := 0
	for _, n := range p.inZone {
		most = max(most, n)
	}
	if most-p.inZone[p.spares[0].Zone] < 2 {
		return Change{}, false
	}
	return p.promote("its zone has fewer voters than others")
}

// demote takes the vote from a server that is down, else from one of the zone with most
// voters; never from the leader.
func (p *picture) demote(why string) (Change, bool) {
	var worst *Server
	for i, s := range p.servers {
		if s.Voter && s.Node != p.leader && (worst == nil || p.worse(s, *worst)) {
			worst = &p.servers[i]
		}
	}
	if worst == nil {
		return Change{}, false
	}
	return p.demoteIfSafe(*worst, why)
}

func (p *picture) worse(a, b Server) bool {
	if aDown, bDown := a.Health == HealthDown, b.Health == HealthDown; aDown || bDown {
		return aDown && !bDown
	}
	return p.inZone[a.Zone] > p.inZone[b.Zone]
}
