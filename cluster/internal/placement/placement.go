package placement

import (
	"cmp"
	"math"
	"slices"
)

// Node is where replicas can be.
type Node struct {
	ID     uint16
	Weight float64 // > 0, in any unit
	Zone   string
}

// Input is what Compute works from.
type Input struct {
	Nodes      []Node // any order; IDs are distinct
	Copies     int
	Partitions int
	Seed       uint64 // tells tables of different policies apart
	// Previous is the placement so far, by partition; empty if there is none. Nodes in
	// it that are not in Nodes have left.
	Previous [][]uint16
}

// tolerance is how far a node may drift from its share before replicas are moved for
// the sake of balance alone.
const tolerance = 0.05

// Compute returns for each partition the nodes that shall hold it: as many as there are
// copies or, if that is fewer, nodes. The first is the wanted primary.
func Compute(in Input) [][]uint16 {
	p := newPlan(in)
	p.keep()
	p.fill()
	for range balanceRounds {
		shed, raised := p.shed(), p.raise()
		if !shed && !raised {
			break
		}
	}
	p.balancePrimaries()
	out := make([][]uint16, len(p.sets))
	for i, set := range p.sets {
		out[i] = make([]uint16, len(set))
		for k, n := range set {
			out[i][k] = p.nodes[n].ID
		}
	}
	return out
}

// balanceRounds bounds how often shed and raise take turns; two are enough unless zones
// are in the way.
const balanceRounds = 8

// plan is a placement in the making. Nodes are known by their place in nodes.
type plan struct {
	nodes []Node // ascending by ID
	zone  []int  // of each node
	zones int
	limit int // replicas of a partition per zone
	size  int // replicas of a partition
	seed  uint64
	prev  [][]uint16

	share []float64   // replicas that each node should have
	load  []int       // and has
	sets  [][]int     // members by partition
	score [][]float64 // by partition and node; the lowest is the best
}

func newPlan(in Input) *plan {
	p := &plan{nodes: slices.Clone(in.Nodes), seed: in.Seed, prev: in.Previous, sets: make([][]int, in.Partitions)}
	slices.SortFunc(p.nodes, func(a, b Node) int { return cmp.Compare(a.ID, b.ID) })
	names := make([]string, len(p.nodes))
	for i, n := range p.nodes {
		names[i] = n.Zone
	}
	slices.Sort(names)
	names = slices.Compact(names)
	p.zones = len(names)
	p.zone = make([]int, len(p.nodes))
	for i, n := range p.nodes {
		p.zone[i], _ = slices.BinarySearch(names, n.Zone)
	}
	p.size = min(in.Copies, len(p.nodes))
	p.limit = p.zoneLimit()
	p.share = p.shares()
	p.load = make([]int, len(p.nodes))
	p.score = p.scores()
	return p
}

// zoneLimit is the smallest number of replicas per zone with which all find a place.
func (p *plan) zoneLimit() int {
	sizes := make([]int, p.zones)
	for _, z := range p.zone {
		sizes[z]++
	}
	for limit := 1; ; limit++ {
		room := 0
		for _, n := range sizes {
			room += min(n, limit)
		}
		if room >= p.size {
			return limit
		}
	}
}

// shares divides all replicas by weight: first among zones, none of which can hold more
// than limit of each partition, then among the nodes of each zone, none of which can hold
// more than one.
func (p *plan) shares() []float64 {
	weight, room := make([]float64, p.zones), make([]float64, p.zones)
	for i, z := range p.zone {
		weight[z] += p.nodes[i].Weight
		room[z] = min(room[z]+1, float64(p.limit))
	}
	zoneShare := divide(float64(p.size), weight, room)
	share := make([]float64, len(p.nodes))
	for z, s := range zoneShare {
		var members []int
		var weights, rooms []float64
		for i := range p.nodes {
			if p.zone[i] == z {
				members, weights, rooms = append(members, i), append(weights, p.nodes[i].Weight), append(rooms, 1)
			}
		}
		for k, s := range divide(s, weights, rooms) {
			share[members[k]] = s * float64(len(p.sets))
		}
	}
	return share
}

// divide splits total by weight; what is more than someone has room for goes to the rest.
func divide(total float64, weight, room []float64) []float64 {
	part := make([]float64, len(weight))
	full := make([]bool, len(weight))
	for {
		var left, sum float64 = total, 0
		for i, w := range weight {
			if full[i] {
				left -= part[i]
			} else {
				sum += w
			}
		}
		again := false
		for i, w := range weight {
			if full[i] {
				continue
			}
			part[i] = left * w / sum
			if part[i] > room[i] {
				part[i], full[i], again = room[i], true, true
			}
		}
		if !again {
			return part
		}
	}
}

// scores is -ln(u)/weight with u uniform in (0,1] by node and partition: the node with
// the lowest score wins as often as its weight says.
func (p *plan) scores() [][]float64 {
	all := make([]float64, len(p.sets)*len(p.nodes))
	score := make([][]float64, len(p.sets))
	keys := make([]uint64, len(p.nodes))
	for i, n := range p.nodes {
		keys[i] = mix(p.seed<<16 | uint64(n.ID))
	}
	for part := range score {
		s := all[part*len(p.nodes):][:len(p.nodes)]
		for i := range s {
			u := (float64(mix(keys[i]+uint64(part))>>11) + 1) / (1 << 53)
			s[i] = -math.Log(u) / p.nodes[i].Weight
		}
		score[part] = s
	}
	return score
}

// mix is the finalizer of splitmix64.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// keep takes over what is still possible of the previous placement, in its order.
func (p *plan) keep() {
	index := map[uint16]int{}
	for i, n := range p.nodes {
		index[n.ID] = i
	}
	for part := range p.sets {
		if part >= len(p.prev) {
			break
		}
		var set []int
		for _, id := range p.prev[part] {
			if i, ok := index[id]; ok && !slices.Contains(set, i) {
				set = append(set, i)
			}
		}
		// What is too much for a zone or in all goes, the worst score first.
		for p.crowded(set) || len(set) > p.size {
			set = slices.Delete(set, p.worst(part, set), p.worst(part, set)+1)
		}
		p.sets[part] = set
		for _, n := range set {
			p.load[n]++
		}
	}
}

func (p *plan) crowded(set []int) bool {
	for _, n := range set {
		if p.inZone(set, p.zone[n]) > p.limit {
			return true
		}
	}
	return false
}

// worst is the place in set of the member to give up: in a crowded zone if there is one.
func (p *plan) worst(part int, set []int) int {
	crowded, at := p.crowded(set), -1
	for k, n := range set {
		if crowded && p.inZone(set, p.zone[n]) <= p.limit {
			continue
		}
		if at < 0 || p.score[part][n] > p.score[part][set[at]] {
			at = k
		}
	}
	return at
}

func (p *plan) inZone(set []int, zone int) (count int) {
	for _, n := range set {
		if p.zone[n] == zone {
			count++
		}
	}
	return count
}

// fits reports whether node may join the set, in place of the member out (-1: of none).
func (p *plan) fits(set []int, node, out int) bool {
	others := 0
	for _, n := range set {
		if n == node {
			return false
		}
		if n != out && p.zone[n] == p.zone[node] {
			others++
		}
	}
	return others < p.limit
}

func (p *plan) full(n int) int     { return ceil(p.share[n]) }
func (p *plan) tooFull(n int) int  { return max(ceil(p.share[n]), floor(p.share[n]*(1+tolerance))) }
func (p *plan) tooEmpty(n int) int { return min(floor(p.share[n]), ceil(p.share[n]*(1-tolerance))) }

// Shares are sums of rounded quotients: 41.000000001 means 41.
const epsilon = 1e-6

func ceil(x float64) int  { return int(math.Ceil(x - epsilon)) }
func floor(x float64) int { return int(math.Floor(x + epsilon)) }

// fill gives every empty slot to the best node that is not full.
func (p *plan) fill() {
	for part := range p.sets {
		for len(p.sets[part]) < p.size {
			n := p.best(part, -1)
			if n < 0 && p.exchange(part) {
				continue
			}
			if n < 0 {
				n = p.least(part)
			}
			p.sets[part] = append(p.sets[part], n)
			p.load[n]++
		}
	}
}

// best is the node that takes the partition in place of out, -1 if no node with room
// may. The score counts by room, not by weight: what is nearly full is nearly out of the
// race, so that towards the end there still is a choice, and hardly an exchange.
func (p *plan) best(part, out int) int {
	best, lowest := -1, 0.0
	for n, score := range p.score[part] {
		room := p.full(n) - p.load[n]
		if room <= 0 {
			continue
		}
		score *= p.nodes[n].Weight / float64(room)
		if (best < 0 || score < lowest) && p.fits(p.sets[part], n, out) {
			best, lowest = n, score
		}
	}
	return best
}

// least is the node that may take the partition with the least load for its share.
func (p *plan) least(part int) int {
	least := -1
	for n := range p.nodes {
		if (least < 0 || float64(p.load[n])*p.share[least] < float64(p.load[least])*p.share[n]) && p.fits(p.sets[part], n, -1) {
			least = n
		}
	}
	return least
}

// exchange frees a place for a partition that fits on no node with room: a node that is
// full but fits hands one of its other partitions to a node with room.
func (p *plan) exchange(part int) bool {
	for other := range p.sets {
		if other == part {
			continue
		}
		for k, giver := range p.sets[other] {
			if !p.fits(p.sets[part], giver, -1) {
				continue
			}
			taker := p.best(other, giver)
			if taker < 0 {
				continue
			}
			p.replace(other, k, taker)
			p.sets[part] = append(p.sets[part], giver)
			p.load[giver]++
			return true
		}
	}
	return false
}

// replace puts a node in the place of a member, which keeps the order of the others.
func (p *plan) replace(part, at, node int) {
	p.load[p.sets[part][at]]--
	p.sets[part][at] = node
	p.load[node]++
}

// shed moves replicas away from nodes that are too full; false if there are none.
func (p *plan) shed() (moved bool) {
	for n := range p.nodes {
		if p.load[n] <= p.tooFull(n) {
			continue
		}
		for _, part := range p.byScore(n, true) {
			if p.load[n] <= p.full(n) {
				break
			}
			if taker := p.best(part, n); taker >= 0 {
				p.replace(part, slices.Index(p.sets[part], n), taker)
				moved = true
			}
		}
	}
	return moved
}

// raise gives replicas to nodes that are too empty, from those that are over their
// share, or if need be over the lower bound; false if nothing could be done.
func (p *plan) raise() (moved bool) {
	overShare := func(n int) int { return floor(p.share[n]) }
	for n := range p.nodes {
		if p.load[n] >= p.tooEmpty(n) {
			continue
		}
		parts := p.byScore(n, false)
		for _, bound := range []func(int) int{overShare, p.tooEmpty} {
			for _, part := range parts {
				if p.load[n] >= floor(p.share[n]) {
					break
				}
				if at := p.donor(part, n, bound); at >= 0 {
					p.replace(part, at, n)
					moved = true
				}
			}
		}
	}
	return moved
}

// donor is the place of the member with the most above its share that node may replace.
func (p *plan) donor(part, node int, bound func(int) int) int {
	set, at, most := p.sets[part], -1, 0.0
	for k, n := range set {
		over := float64(p.load[n]) / p.share[n]
		if p.load[n] > bound(n) && over > most && p.fits(set, node, n) {
			at, most = k, over
		}
	}
	return at
}

// byScore lists partitions by the node's score: those it is in, the worst first, or those
// it is not in, the best first.
func (p *plan) byScore(n int, in bool) []int {
	var list []int
	for part, set := range p.sets {
		if slices.Contains(set, n) == in {
			list = append(list, part)
		}
	}
	slices.SortFunc(list, func(a, b int) int {
		if in {
			a, b = b, a
		}
		return cmp.Compare(p.score[a][n], p.score[b][n])
	})
	return list
}

// primaryTolerance is how far above its part of all primaries a node may be: changing a
// primary costs a moment of waiting, moving none of the data.
const primaryTolerance = 0.1

// balancePrimaries orders new sets so that primaries are spread as replicas are, and
// changes the primary of old ones only where a node has too many.
func (p *plan) balancePrimaries() {
	primaries := make([]int, len(p.nodes))
	fair := make([]float64, len(p.nodes))
	for n, load := range p.load {
		fair[n] = float64(load) / float64(max(p.size, 1))
	}
	for part, set := range p.sets {
		if len(set) == 0 {
			return // no nodes at all
		}
		if part >= len(p.prev) || len(p.prev[part]) == 0 {
			p.lead(part, primaries, fair)
		}
		primaries[p.sets[part][0]]++
	}
	for part, set := range p.sets {
		first := set[0]
		if primaries[first] <= max(ceil(fair[first]), floor(fair[first]*(1+primaryTolerance))) {
			continue
		}
		primaries[first]--
		p.lead(part, primaries, fair)
		primaries[p.sets[part][0]]++
	}
}

// lead makes the member with the fewest primaries for its load the first.
func (p *plan) lead(part int, primaries []int, fair []float64) {
	set, at := p.sets[part], 0
	for k := range set {
		if float64(primaries[set[k]])*fair[set[at]] < float64(primaries[set[at]])*fair[set[k]] {
			at = k
		}
	}
	set[0], set[at] = set[at], set[0]
}
