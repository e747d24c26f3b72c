package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"

	"sheepdog/storage/object"
)

// Machine applies commands one at a time. View may be called at any time.
type Machine struct {
	view atomic.Pointer[View]
}

// New returns the machine of a cluster that is not formatted.
func New() *Machine {
	m := new(Machine)
	m.view.Store(&View{})
	return m
}

// View returns the state after the last command.
func (m *Machine) View() *View { return m.view.Load() }

// Apply carries out an encoded Command and returns an encoded Result.
func (m *Machine) Apply(command []byte) []byte {
	next := *m.view.Load() // slices are replaced, never changed, below
	var res Result
	if err := next.apply(command, &res); err != nil {
		res = Result{Refusal: refusalOf(err), Reason: reasonOf(err), Epoch: m.view.Load().Epoch}
	} else {
		res.Epoch = next.Epoch
		m.view.Store(&next)
	}
	b, err := json.Marshal(res)
	if err != nil {
		panic(fmt.Sprintf("encode result: %v", err)) // a struct of numbers and strings always encodes
	}
	return b
}

func refusalOf(err error) string {
	for name, kind := range refusals {
		if errors.Is(err, kind) {
			return name
		}
	}
	return "invalid"
}

// reasonOf leaves out the kind's own text, which Result.Err puts back.
func reasonOf(err error) string {
	s := err.Error()
	for _, kind := range refusals {
		s = strings.TrimPrefix(s, kind.Error()+": ")
	}
	return s
}

func refuse(kind error, format string, args ...any) error {
	return fmt.Errorf("%w: %s", kind, fmt.Sprintf(format, args...))
}

func (v *View) apply(command []byte, res *Result) error {
	var c Command
	if err := json.Unmarshal(command, &c); err != nil {
		return refuse(ErrInvalid, "%v", err)
	}
	switch {
	case c.Format != nil:
		return v.format(c.Format, res)
	case v.Cluster.ID == "":
		return refuse(ErrNotFormatted, `run "dog cluster format"`)
	case c.Announce != nil:
		return v.announce(c.Announce, res)
	case c.AnnounceAll != nil:
		return v.announceAll(c.AnnounceAll, res)
	case c.Confirm != nil:
		return v.confirmNodes(c.Confirm)
	case c.Witness != nil:
		v.witness(c.Witness)
		return nil
	case c.SetNode != nil:
		return v.setNode(c.SetNode)
	case c.SetNodes != nil:
		return v.setNodes(c.SetNodes)
	case c.SetDisks != nil:
		return v.setDisks(c.SetDisks)
	case c.Leave != nil:
		return v.depart(c.Leave, res)
	case c.Enroll != nil:
		return v.enrollMore(c.Enroll, res)
	case c.Drain != nil:
		return v.drain(c.Drain)
	case c.Reweight != nil:
		return v.reweight(c.Reweight)
	case c.SetOut != nil:
		return v.setOut(c.SetOut)
	case c.SetOutAfter != nil:
		return v.setOutAfter(c.SetOutAfter)
	case c.Remove != nil:
		return v.remove(c.Remove)
	case c.Welcome != nil:
		v.welcome(c.Welcome.Name)
		return nil
	case c.Force != nil:
		return v.force(c.Force, res)
	case c.AddPolicy != nil:
		return v.addPolicy(c.AddPolicy, res)
	case c.SetDefault != nil:
		return v.setDefault(c.SetDefault, res)
	case c.SetHold != nil:
		return v.setHold(c.SetHold)
	case c.SetTargets != nil:
		return v.setTargets(c.SetTargets)
	case c.ChangeISR != nil:
		return v.changeISR(c.ChangeISR)
	case c.ChangeISRs != nil:
		return v.changeISRs(c.ChangeISRs, res)
	}
	return refuse(ErrInvalid, "a command that this version does not know")
}

func (v *View) format(c *Format, res *Result) error {
	if v.Cluster.ID != "" {
		if v.Cluster.ID != c.ID {
			return refuse(ErrFormatted, "as %q on %s, id %s", v.Cluster.Name, v.Cluster.Created.Format("2006-01-02 15:04:05 MST"), v.Cluster.ID)
		}
		res.Policy = v.Cluster.DefaultPolicy
		return nil
	}
	switch {
	case c.ID == "" || len(c.ID) > maxNameBytes:
		return refuse(ErrInvalid, "a cluster needs an id of at most %d bytes", maxNameBytes)
	case len(c.Name) > maxNameBytes:
		return refuse(ErrInvalid, "the cluster's name is longer than %d bytes", maxNameBytes)
	case c.Partitions < minPartitions || c.Partitions > MaxPartitions || c.Partitions&(c.Partitions-1) != 0:
		return refuse(ErrInvalid, "%d partitions: must be a power of two from %d to %d", c.Partitions, minPartitions, MaxPartitions)
	case c.ObjectSizeShift < object.MinSizeShift || c.ObjectSizeShift > object.MaxSizeShift:
		return refuse(ErrInvalid, "object size 2^%d: must be a power of two from 1 MiB to 2 GiB", c.ObjectSizeShift)
	}
	v.Cluster = Cluster{ID: c.ID, Name: c.Name, Created: c.Created, Partitions: c.Partitions, ObjectSizeShift: c.ObjectSizeShift}
	v.Epoch++
	if err := v.addPolicy(&AddPolicy{Copies: c.Copies}, res); err != nil {
		return err
	}
	v.Cluster.DefaultPolicy = res.Policy
	return nil
}

func (v *View) addPolicy(c *AddPolicy, res *Result) error {
	if p := v.PolicyOf(c.Copies); p != nil {
		res.Policy = p.ID
		return nil
	}
	if c.Copies < 1 || c.Copies > MaxCopies {
		return refuse(ErrInvalid, "%d copies: must be from 1 to %d", c.Copies, MaxCopies)
	}
	if len(v.Policies) == MaxPolicies-1 {
		return refuse(ErrInvalid, "%d policies are all that a cluster may have", MaxPolicies-1)
	}
	p := &Policy{ID: object.PolicyID(len(v.Policies) + 1), Copies: c.Copies, MinInSync: 1}
	v.Epoch++
	v.Policies = append(slices.Clone(v.Policies), p)
	res.Policy = p.ID
	return nil
}

func (v *View) setDefault(c *SetDefault, res *Result) error {
	p := v.PolicyOf(c.Copies)
	if p == nil {
		return refuse(ErrNotFound, "no policy keeps %d copies", c.Copies)
	}
	if res.Policy = p.ID; v.Cluster.DefaultPolicy != p.ID {
		v.Epoch++
		v.Cluster.DefaultPolicy = p.ID
	}
	return nil
}

func (v *View) setHold(c *SetHold) error {
	if v.Cluster.Hold != c.Hold {
		v.Epoch++
		v.Cluster.Hold = c.Hold
	}
	return nil
}
