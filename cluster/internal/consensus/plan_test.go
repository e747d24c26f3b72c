package consensus

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write testdata anew")

// parseServers reads servers like "a:v b:v? c:n! d:v-": name, voter or not, and
// after it / with a zone, ! down, ? unknown, ~ behind, - leaving. The first one leads.
func parseServers(t *testing.T, text string) (servers []Server, leader string) {
	t.Helper()
	for _, f := range strings.Fields(text) {
		name, rest, ok := strings.Cut(f, ":")
		if !ok || rest == "" {
			t.Fatalf("server %q", f)
		}
		s := Server{Node: name, Zone: name, Voter: rest[0] == 'v', Health: HealthOK}
		rest, zone, zoned := strings.Cut(rest[1:], "/")
		if zoned {
			s.Zone = zone
		}
		for _, r := range rest {
			switch r {
			case '!':
				s.Health = HealthDown
			case '?':
				s.Health = HealthUnknown
			case '~':
				s.Health = HealthBehind
			case '-':
				s.Leaving = true
			}
		}
		servers = append(servers, s)
	}
	return servers, servers[0].Node
}

func formatServers(servers []Server, leader string) string {
	var b strings.Builder
	for _, s := range servers {
		kind := "n"
		if s.Voter {
			kind = "v"
		}
		kind += map[Health]string{HealthDown: "!", HealthUnknown: "?", HealthBehind: "~"}[s.Health]
		if s.Leaving {
			kind += "-"
		}
		if s.Zone != s.Node {
			kind += "/" + s.Zone
		}
		if s.Node == leader {
			kind += "*"
		}
		fmt.Fprintf(&b, " %s:%s", s.Node, kind)
	}
	return strings.TrimSpace(b.String())
}

// carry returns the servers and the leader after a change.
func carry(servers []Server, leader string, c Change) ([]Server, string) {
	var next []Server
	for _, s := range servers {
		if s.Node == c.Node {
			switch c.Do {
			case Promote:
				s.Voter = true
			case Demote:
				s.Voter = false
			case Remove:
				continue
			case HandOver:
				leader = s.Node
			}
		}
		next = append(next, s)
	}
	return next, leader
}

// The stories of testdata/plan: servers, and all changes until there is nothing to do.
func TestPlanStories(t *testing.T) {
	const path = "testdata/plan"
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for line := range strings.Lines(string(b)) {
		line = strings.TrimRight(line, "\n")
		if strings.HasPrefix(line, "    ") {
			continue // an answer
		}
		out.WriteString(line + "\n")
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		servers, leader := parseServers(t, line)
		for range 20 {
			c := plan(servers, leader)
			if c.Do == Nothing {
				break
			}
			servers, leader = carry(servers, leader, c)
			fmt.Fprintf(&out, "    %s %s: %s\n", c.Do, c.Node, c.Why)
		}
		fmt.Fprintf(&out, "    = %s\n", formatServers(servers, leader))
	}
	if *update {
		if err := os.WriteFile(path, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if out.String() != string(b) && !*update {
		t.Errorf("testdata/plan says otherwise; run with -update and look at the difference. Now:\n%s", out.String())
	}
}

// spread of votes: how many more voters may be lost, -1 without a quorum.
func tolerance(servers []Server) int {
	voters, up := 0, 0
	for _, s := range servers {
		if s.Voter {
			voters++
			if s.Health != HealthDown {
				up++
			}
		}
	}
	return max(up-quorum(voters), -1)
}

// checkPlan carries out all changes that plan wants and checks each, and the end.
func checkPlan(t *testing.T, servers []Server, leader string) {
	first := formatServers(servers, leader)
	fail := func(format string, args ...any) {
		t.Helper()
		t.Fatalf("from %s: at %s: %s", first, formatServers(servers, leader), fmt.Sprintf(format, args...))
	}
	for range 4 * len(servers) {
		c := plan(servers, leader)
		if c.Do == Nothing {
			checkSettled(t, servers, leader, fail)
			return
		}
		old := servers
		var subject *Server
		leaving := false
		for i, s := range old {
			leaving = leaving || s.Leaving
			if s.Node == c.Node {
				subject = &old[i]
			}
		}
		switch {
		case subject == nil:
			fail("%s of %q, who is not there", c.Do, c.Node)
		case c.Why == "":
			fail("%s %s without a reason", c.Do, c.Node)
		case c.Do == Promote && (subject.Voter || subject.Health != HealthOK || subject.Leaving):
			fail("promotes %s", c.Node)
		case c.Do == Demote && (!subject.Voter || c.Node == leader):
			fail("demotes %s", c.Node)
		case c.Do == Remove && (subject.Voter || !subject.Leaving):
			fail("removes %s", c.Node)
		case c.Do == HandOver && (!subject.Voter || subject.Health != HealthOK || subject.Leaving):
			fail("hands over to %s", c.Node)
		}
		servers, leader = carry(old, leader, c)
		switch before, after := tolerance(old), tolerance(servers); {
		case after < 0:
			fail("no quorum any more")
		case after < before && !leaving:
			fail("%d voters may be lost, before it were %d", after, before)
		}
	}
	fail("no end of changes")
}

func checkSettled(t *testing.T, servers []Server, leader string, fail func(string, ...any)) {
	voters, up, spares, pending := 0, 0, 0, 0
	zones := map[string]int{}
	var leaving []string
	for _, s := range servers {
		switch {
		case s.Leaving:
			leaving = append(leaving, s.Node)
		case !s.Voter && s.Health == HealthOK:
			spares++
		case !s.Voter && s.Health != HealthDown:
			pending++
		}
		if s.Voter {
			voters++
			zones[s.Zone]++
			if s.Health != HealthDown {
				up++
			}
		}
	}
	if len(leaving) > 0 {
		for _, s := range servers { // only those who cannot be let go
			if s.Leaving && !s.Voter {
				fail("%s stays", s.Node)
			}
		}
		return
	}
	if voters > maxVoters {
		fail("%d voters", voters)
	}
	if voters%2 == 0 && up == voters && pending == 0 && voters != 2 {
		fail("an even number of voters")
	}
	if up < voters && spares > 0 {
		fail("a voter is down, and nobody takes its place")
	}
	if up < voters || pending > 0 {
		return
	}
	want := min(len(servers), maxVoters)
	if down := len(servers) - voters - spares; down == 0 && voters != want-(want+1)%2 {
		fail("%d voters of %d servers that are all up", voters, len(servers))
	}
	most := 0
	for _, n := range zones {
		most = max(most, n)
	}
	for _, s := range servers {
		if !s.Voter && s.Health == HealthOK && most-zones[s.Zone] >= 2 {
			fail("zone %q has %d voters, another one has %d", s.Zone, zones[s.Zone], most)
		}
	}
}

// kinds are all that a server can be, but for its zone.
var kinds = func() (all []Server) {
	for _, leaving := range []bool{false, true} {
		for _, health := range []Health{HealthOK, HealthDown, HealthBehind} {
			for _, voter := range []bool{true, false} {
				all = append(all, Server{Voter: voter, Health: health, Leaving: leaving})
			}
		}
	}
	return all
}()

// All clusters of up to four servers, in all zones, with a quorum.
func TestPlanOfAllSmallClusters(t *testing.T) {
	for n := 1; n <= 4; n++ {
		zones := 1 << (n - 1)
		for z := range zones {
			servers := make([]Server, n)
			var fill func(i int)
			fill = func(i int) {
				if i == n {
					if tolerance(servers) >= 0 {
						checkPlan(t, servers, "a")
					}
					return
				}
				for _, k := range kinds {
					if i == 0 && (!k.Voter || k.Health != HealthOK) {
						continue // the leader votes and is well
					}
					k.Node, k.Zone = string(rune('a'+i)), "z0"
					if z>>max(i-1, 0)&1 == 1 && i > 0 {
						k.Zone = "z1"
					}
					servers[i] = k
					fill(i + 1)
				}
			}
			fill(0)
		}
	}
}

// Larger ones by chance.
func TestPlanOfManyClusters(t *testing.T) {
	for seed := range uint64(50_000) {
		r := rand.New(rand.NewPCG(seed, 1))
		servers := make([]Server, 5+r.IntN(6))
		zones := 1 + r.IntN(5)
		calm := r.IntN(2) == 0
		for i := range servers {
			k := kinds[r.IntN(len(kinds))]
			if calm {
				k.Leaving = false
			}
			if i == 0 {
				k = Server{Voter: true, Health: HealthOK, Leaving: !calm && r.IntN(4) == 0}
			}
			k.Node, k.Zone = string(rune('a'+i)), fmt.Sprint("z", r.IntN(zones))
			servers[i] = k
		}
		voters := 0
		for i := range servers { // more than six voters are never there
			if servers[i].Voter {
				voters++
				servers[i].Voter = voters <= maxVoters+1
			}
		}
		if tolerance(servers) >= 0 {
			checkPlan(t, servers, "a")
		}
	}
}
