package replica

import "sheepdog/cluster/state"

// early is a message of an epoch that this node has not heard of yet: the state comes to
// some nodes before others. To refuse it would cost the sender a pause.
type early struct {
	epoch  state.Epoch
	again  func(now Time)
	refuse func()
	until  Time // 0: not set yet
}

// earlyResends is for how many times Options.Resend such a message waits. Who does not hear of
// an epoch for that long may be cut off, and the sender shall look elsewhere.
const earlyResends = 10

// wait keeps a message for when its epoch is known here.
func (p *Partition) wait(epoch state.Epoch, again func(now Time), refuse func()) {
	p.early = append(p.early, early{epoch: epoch, again: again, refuse: refuse})
}

// TakeEarly takes the messages that have waited for this epoch or an earlier one, in their order.
func (p *Partition) TakeEarly(now Time) {
	list := p.early
	p.early = nil
	for _, e := range list {
		if e.epoch > p.view.Epoch {
			p.early = append(p.early, e)
			continue
		}
		e.again(now)
	}
}

// tickEarly refuses the messages that have waited for too long.
func (p *Partition) tickEarly(now Time) {
	var left []early
	for _, e := range p.early {
		switch {
		case e.until == 0:
			e.until = now + earlyResends*Time(p.opt.Resend)
			left = append(left, e)
		case now < e.until:
			left = append(left, e)
		default:
			e.refuse()
		}
	}
	p.early = left
}
