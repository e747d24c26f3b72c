package replica

// Learning says how far a learner is.
type Learning struct {
	Peer
	// Left is how many objects are to be looked at yet; Listed: that is known.
	Left   int
	Listed bool
	// NoSpace: some of it waits for space.
	NoSpace bool
}

// HasLearners reports whether this node brings others in sync.
func (p *Partition) HasLearners() bool { return p.role == primary && len(p.view.Learners) > 0 }

// Learning appends how far each learner is.
func (p *Partition) Learning(to []Learning) []Learning {
	if !p.HasLearners() {
		return to
	}
	for i := range p.peers {
		if l := p.peers[i].learner; l != nil {
			to = append(to, Learning{p.peers[i].Peer, len(l.queue) + len(l.wanting) + l.underway, l.phase >= repairing, p.peers[i].hunger > 0})
		}
	}
	return to
}

// Starved reports whether changes wait until more nodes are in sync (INV-R4).
func (p *Partition) Starved() bool { return p.role == primary && len(p.view.ISR) < p.view.MinInSync }

// Copies is how many nodes are in sync.
func (p *Partition) Copies() int { return len(p.view.ISR) }
