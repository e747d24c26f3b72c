package replicas

import (
	"slices"
	"testing"
	"time"

	"sheepdog/cluster/internal/replica"
)

// paced is a client with one change under way at a time, and nodes that bring a learner objects
// beside it, on a clock of their own.
type paced struct {
	nodes    []*pacedNode
	slowdown func(underway int) float64 // of the client
	lasts    time.Duration              // for how long an object slows it down when it is there
	lasting  []time.Duration            // until when some do
	now      time.Duration
	changes  int
	objects  int
	most     int // under way at a time
}

type pacedNode struct {
	pace
	left []time.Duration // of each object under way
}

const (
	pacedStep   = 250 * time.Microsecond
	pacedChange = time.Millisecond      // alone
	pacedObject = 20 * time.Millisecond // by itself, beside a client
	pacedLimit  = 8                     // without clients
)

func newPaced(nodes int, slowdown func(int) float64) *paced {
	p := &paced{slowdown: slowdown}
	for range nodes {
		p.nodes = append(p.nodes, new(pacedNode))
	}
	return p
}

func (p *paced) underway() (n int) {
	for _, d := range p.nodes {
		n += len(d.left)
	}
	return n
}

// run lets time pass. client is what the client does: it works, waits for something else, or is gone.
func (p *paced) run(d time.Duration, client string) {
	began, left := p.now, 1.0
	for end := p.now + d; p.now < end; p.now += pacedStep {
		p.most = max(p.most, p.underway())
		p.lasting = slices.DeleteFunc(p.lasting, func(end time.Duration) bool { return end <= p.now })
		busy := p.underway() + len(p.lasting)
		for _, n := range p.nodes {
			p.step(n, client != "gone")
		}
		if client != "works" {
			continue
		}
		if left -= float64(pacedStep) / float64(pacedChange) / p.slowdown(busy); left <= 0 {
			// Each node is the primary of a share of what the client changes.
			i := p.changes % len(p.nodes)
			p.nodes[i].took(pacedTime(began), pacedTime(p.now))
			p.changes++
			began, left = p.now, 1
		}
	}
}

// pacedTime is on the nodes' clock, which begins anywhere.
func pacedTime(d time.Duration) replica.Time { return replica.Time(d + time.Hour) }

// step is what a node does in a moment.
func (p *paced) step(n *pacedNode, client bool) {
	now := pacedTime(p.now)
	kept := n.left[:0]
	for _, l := range n.left {
		if l -= pacedStep / time.Duration(max(1, p.underway())); l > 0 {
			kept = append(kept, l)
		} else {
			p.objects++
			p.lasting = append(p.lasting, p.now+p.lasts)
		}
	}
	ended := len(kept) < len(n.left)
	n.left = kept
	tick := p.now%tickEvery == 0
	if tick {
		waiting := int64(0)
		if client {
			waiting = 1
		}
		n.tick(now, 0, waiting, int64(len(n.left)))
	}
	for (tick || ended) && int64(len(n.left)) < n.limit(now, pacedLimit, int64(len(n.left)), 2) {
		n.left = append(n.left, pacedObject)
	}
}

// TestPaceKeepsShare: whatever repairs cost a client, it keeps its share, and no more time than that
// takes is left unused.
func TestPaceKeepsShare(t *testing.T) {
	for _, c := range []struct {
		name     string
		nodes    int
		slowdown func(int) float64
		lasts    time.Duration
		keeps    [2]float64 // at least, and at most
		objects  int        // at least, a second
	}{
		{"dear", 1, func(k int) float64 { return 1 + 3*float64(k) }, 0, [2]float64{0.65, 0.85}, 13},
		{"dear afterwards", 1, func(k int) float64 { return 1 + 3*float64(k) }, 60 * time.Millisecond, [2]float64{0.65, 0.85}, 3},
		{"cheap", 1, func(k int) float64 { return 1 + 0.1*float64(k) }, 0, [2]float64{0.7, 1}, 33},
		{"two dear", 2, func(k int) float64 { return 1 + 1.5*float64(k) }, 0, [2]float64{0.65, 0.85}, 13},
		{"two that stop it", 2, func(k int) float64 { return 1 + 100*float64(k) }, 0, [2]float64{0.6, 0.85}, 11},
	} {
		t.Run(c.name, func(t *testing.T) {
			alone := newPaced(1, func(int) float64 { return 1 })
			alone.run(time.Second, "works")
			p := newPaced(c.nodes, c.slowdown)
			p.lasts = c.lasts
			p.run(10*time.Second, "works") // until it is found
			p.changes, p.objects = 0, 0
			const seconds = 10
			p.run(seconds*time.Second, "works")
			keeps, objects := float64(p.changes)/seconds/float64(alone.changes), p.objects/seconds
			t.Logf("keeps %.2f, %d objects a second, %d at a time", keeps, objects, p.most)
			if keeps < c.keeps[0] || keeps > c.keeps[1] || objects < c.objects {
				t.Errorf("the client keeps %.2f, want %v; %d objects a second, want %d", keeps, c.keeps, objects, c.objects)
			}
		})
	}
}

// TestPaceOfClientsThatCome: without clients as much goes as may, and who comes then does not wait long for
// a share, nor do the learners.
func TestPaceOfClientsThatCome(t *testing.T) {
	p := newPaced(1, func(k int) float64 { return 1 + 3*float64(k) })
	p.run(2*time.Second, "gone")
	if p.most != pacedLimit {
		t.Errorf("%d at a time without clients, want %d", p.most, pacedLimit)
	}
	p.run(500*time.Millisecond, "works")
	p.most = 0
	for i := range 4 {
		p.objects = 0
		p.run(5*time.Second, "works")
		if p.objects < 10 {
			t.Errorf("seconds %d to %d: %d objects", 5*i, 5*i+5, p.objects)
		}
	}
	if p.most > 2 { // until it is found what they cost
		t.Errorf("%d at a time beside a client, want 2 at most", p.most)
	}
}

// TestPaceOfClientsThatWait: a client whose request is under way for long is not gone.
func TestPaceOfClientsThatWait(t *testing.T) {
	p := newPaced(1, func(k int) float64 { return 1 + 3*float64(k) })
	p.run(2*time.Second, "works")
	p.most = 0
	p.run(10*time.Second, "waits")
	if p.most > 1 {
		t.Errorf("%d at a time beside a client that waits, want 1", p.most)
	}
}
