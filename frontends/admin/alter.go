package admin

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"sync"
	"time"

	"sheepdog/frontends/admin/api"
	"sheepdog/vdi"
)

// Copies are altered best by the node that writes the VDIs concerned: its clients go on, and nobody is made to wait. So
// any node can be asked, and has that one do it: it begins an altering there, asks how far it is, and ends it when its own
// client goes. A node does what another one asks for by itself: it passes nothing on.

// alterCopies ends when its client goes: everything is as before then.
func (c *call) alterCopies() error {
	var q api.CopiesRequest
	if err := c.body(&q); err != nil {
		return err
	}
	return c.events(func(ctx context.Context, l *lines) (api.Event, error) {
		w := alterWork{s: c.s, ID: rand.Text(), Name: c.name(), Copies: q.Copies, tell: onceAltering(l.event)}
		a, err := w.do(ctx)
		return api.Event{Altered: a}, err
	})
}

// onceAltering passes on who is concerned once: what is begun here first, and then at another node, is so no second time.
func onceAltering(tell func(api.Event) error) func(api.Event) error {
	told := false
	return func(e api.Event) error {
		if e.Altering != nil && told {
			return nil
		}
		told = told || e.Altering != nil
		return tell(e)
	}
}

// alterWork is what is wanted. It travels as JSON.
type alterWork struct {
	ID     string `json:"id"` // of the altering that it becomes at another node
	Name   string `json:"name"`
	Copies int    `json:"copies"`

	s    *Server
	tell func(api.Event) error
}

// do does it where it is done best.
func (w *alterWork) do(ctx context.Context) (*api.Altered, error) {
	// If it is not known who writes, here it is said what is wrong.
	if node, err := w.s.cfg.Volumes.Writer(ctx, w.Name); err == nil && w.s.isUp(node) {
		a, err := w.at(ctx, node)
		if err == nil || errorOf(err).Kind != api.KindNoRoute { // of an earlier version
			return a, err
		}
	}
	a, err := w.here(ctx)
	if e, ok := errors.AsType[*vdi.Elsewhere](err); ok && w.s.isUp(e.Node) {
		b, there := w.at(ctx, e.Node)
		if there == nil {
			return b, nil
		}
		return nil, refuse(errorOf(there).Kind, "%s; through node %q: %s", errorOf(err).Message, e.Node, errorOf(there).Message)
	}
	return a, err
}

// isUp reports whether another node can be asked.
func (s *Server) isUp(node string) bool {
	n, ok := s.nodeCalled(node)
	return ok && node == n.Name && !n.Self && n.State == api.NodeUp
}

func (w *alterWork) here(ctx context.Context) (*api.Altered, error) {
	begun := func(a vdi.Altered) error { return w.tell(api.Event{Altering: w.altered(a)}) }
	a, err := w.s.cfg.Volumes.AlterCopies(ctx, w.Name, w.Copies, begun, progressTo(w.tell, w.Name))
	if err != nil {
		return nil, err
	}
	return w.altered(a), nil
}

func (w *alterWork) altered(a vdi.Altered) *api.Altered {
	r := &api.Altered{Name: w.Name, From: a.From, To: a.To, VDIs: []string{}, Copied: a.Bytes, Pause: a.Pause.Seconds()}
	for _, i := range a.Volumes {
		name := i.Name
		if tag := snapshotName(i); tag != "" {
			name += "@" + tag
		}
		r.VDIs = append(r.VDIs, name)
	}
	return r
}

const alteringsPath = api.Prefix + "/node/alterings"

// at has another node do it.
func (w *alterWork) at(ctx context.Context, node string) (*api.Altered, error) {
	body, err := json.Marshal(w)
	if err != nil {
		return nil, fmt.Errorf("encode what is to be altered: %w", err)
	}
	of := url.Values{"id": {w.ID}}.Encode()
	a, silent, err := w.follow(ctx, node, body, of)
	if !silent || ctx.Err() != nil {
		w.forget(ctx, node, of)
		return a, err
	}
	if e := errorOf(err); e.Kind == api.KindNoRoute || e.Kind == api.KindOverloaded || e.Kind == api.KindClosed {
		return nil, e
	}
	return nil, refuse(api.KindUnavailable, "alter the copies of %q to %d through node %q, which writes it: %s", w.Name, w.Copies, node, errorOf(err).Message).
		withHint(fmt.Sprintf("everything is as before, unless it was through: %q shows that; then ask again", "dog vdi list "+w.Name))
}

// follow begins it at another node and passes on how far that is, until it is through, or silent: does not say any more
// what has become of it.
func (w *alterWork) follow(ctx context.Context, node string, body []byte, of string) (a *api.Altered, silent bool, err error) {
	now, err := askOne[api.Event](ctx, w.s, node, question{Method: http.MethodPost, Path: alteringsPath, Body: body})
	for seen := (api.Event{}); err == nil; {
		if err := w.pass(now, &seen); err != nil {
			return nil, false, err
		}
		switch {
		case now.Error != nil:
			return nil, false, now.Error
		case now.Altered != nil:
			return now.Altered, false, nil
		}
		select {
		case <-ctx.Done():
			return nil, false, ctx.Err()
		case <-time.After(progressEvery):
		}
		now, err = askOne[api.Event](ctx, w.s, node, question{Method: http.MethodGet, Path: alteringsPath, Query: of})
	}
	return nil, true, err
}

// pass passes on what is new.
func (w *alterWork) pass(now api.Event, seen *api.Event) error {
	if now.Altering != nil && seen.Altering == nil {
		seen.Altering = now.Altering
		if err := w.tell(api.Event{Altering: now.Altering}); err != nil {
			return err
		}
	}
	if now.Progress != nil && (seen.Progress == nil || *seen.Progress != *now.Progress) {
		seen.Progress = now.Progress
		return w.tell(api.Event{Progress: now.Progress})
	}
	return nil
}

// forget tells the other node that nobody asks any more: it ends what it still does. If it does not hear of it, it
// notices.
func (w *alterWork) forget(ctx context.Context, node, of string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), askTimeout)
	defer cancel()
	if _, _, err := w.s.ask(ctx, node, question{Method: http.MethodDelete, Path: alteringsPath, Query: of}); err != nil {
		w.s.log.Info("a node was not told that nobody waits for copies to be altered any more", "node", node, "error", err)
	}
}

// alterings are what other nodes have this one do.
type alterings struct {
	mu   sync.Mutex
	list map[string]*altering // by ID
	wait sync.WaitGroup
}

// altering is one of them. It is forgotten some time after it was asked for the last time, and ends then.
type altering struct {
	drop  context.CancelFunc // ends it, and forgets it
	asked chan struct{}      // somebody has

	mu  sync.Mutex
	now api.Event // all that there is to tell
}

// alteringPatience is how long an altering goes on that nobody asks for: longer than a question is asked again.
const alteringPatience = 15 * time.Second

func (x *altering) tell(e api.Event) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if e.Altering != nil {
		x.now.Altering = e.Altering
	} else {
		x.now.Progress = e.Progress
	}
	return nil
}

func (x *altering) state() api.Event {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.now
}

// beginAltering begins what another node asks for.
func (c *call) beginAltering() (any, error) {
	w := alterWork{s: c.s}
	if err := c.body(&w); err != nil {
		return nil, err
	}
	all := &c.s.alterings
	all.mu.Lock()
	defer all.mu.Unlock()
	if x := all.list[w.ID]; x != nil {
		return x.state(), nil
	}
	life, drop := context.WithCancel(context.Background())
	ctx, release, err := c.s.transfer(life)
	if err != nil {
		drop()
		return nil, err
	}
	x := &altering{drop: drop, asked: make(chan struct{}, 1)}
	w.tell = x.tell
	c.noted("copies are to be altered", "vdi", w.Name, "copies", w.Copies)
	if all.list == nil {
		all.list = map[string]*altering{}
	}
	all.list[w.ID] = x
	ended := make(chan struct{})
	all.wait.Go(func() {
		defer close(ended)
		defer release()
		a, err := w.here(ctx)
		x.mu.Lock()
		defer x.mu.Unlock()
		if x.now.Altered = a; err != nil {
			x.now.Error = errorOf(cause(ctx, err))
		}
	})
	all.wait.Go(func() {
		x.await(life, c.s.stopping)
		<-ended
		all.mu.Lock()
		defer all.mu.Unlock()
		delete(all.list, w.ID)
	})
	return x.state(), nil
}

// await returns when nobody asks for the altering any more, and ends it.
func (x *altering) await(life context.Context, stopping <-chan struct{}) {
	defer x.drop()
	t := time.NewTimer(alteringPatience)
	defer t.Stop()
	for {
		select {
		case <-x.asked:
			t.Reset(alteringPatience)
		case <-life.Done():
			return
		case <-t.C:
			return
		case <-stopping:
			return
		}
	}
}

// alteringState says how far it is.
func (c *call) alteringState() (any, error) {
	all := &c.s.alterings
	all.mu.Lock()
	defer all.mu.Unlock()
	x := all.list[c.query("id")]
	if x == nil {
		return nil, refuse(api.KindNotFound, "node %q knows nothing of it: it was started anew, or was not asked for long", c.s.cfg.Node)
	}
	select {
	case x.asked <- struct{}{}:
	default:
	}
	return x.state(), nil
}

// endAltering ends it, if it goes on.
func (c *call) endAltering() (any, error) {
	all := &c.s.alterings
	all.mu.Lock()
	defer all.mu.Unlock()
	if x := all.list[c.query("id")]; x != nil {
		x.drop()
	}
	return nil, nil
}
