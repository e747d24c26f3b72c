package admin

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"sync"
	"time"

	"sheepdog/frontends/admin/api"
	"sheepdog/storage/object"
)

// scrubbing is a scrub that somebody asked for. There is one at a time: who asks while one
// goes on is told of that.
type scrubbing struct {
	mu      sync.Mutex
	running bool
	err     error
	wait    sync.WaitGroup
}

// begin starts a scrub, unless one goes on.
func (x *scrubbing) begin(s *Server, repair bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.running {
		return
	}
	x.running, x.err = true, nil
	x.wait.Go(func() {
		ctx, cancel := context.WithCancel(context.Background())
		stopped := make(chan struct{})
		go func() {
			select {
			case <-s.stopping:
				cancel()
			case <-stopped:
			}
		}()
		err := s.cfg.Scrub(ctx, repair)
		close(stopped)
		cancel()
		if errors.Is(err, object.ErrCorrupt) {
			err = nil // what is corrupt is in what the disks say of themselves
		}
		x.mu.Lock()
		x.running, x.err = false, err
		x.mu.Unlock()
	})
}

func (x *scrubbing) state(s *Server) api.ScrubState {
	x.mu.Lock()
	defer x.mu.Unlock()
	st := api.ScrubState{Running: x.running, Done: 1}
	if x.err != nil {
		st.Error = x.err.Error()
	}
	for _, d := range s.disks() {
		if x.running && d.Scrub.Running {
			st.Done = min(st.Done, d.Scrub.Done)
		}
	}
	return st
}

func (c *call) scrubState() (any, error) { return c.s.scrub.state(c.s), nil }

func (c *call) startScrub() (any, error) {
	repair, err := c.flag("repair")
	if err != nil {
		return nil, err
	}
	c.noted("scrub was asked for", "repair", repair)
	c.s.scrub.begin(c.s, repair)
	return c.scrubState()
}

// scrubEvery is how often it is asked how far a scrub is.
const scrubEvery = 200 * time.Millisecond

// scrubAll has all nodes read all they have, and returns when they have. Nodes that do not
// answer are problems of the report.
func (c *call) scrubAll(ctx context.Context, l *lines, r *api.CheckReport, repair bool) error {
	query := url.Values{}
	if repair {
		query.Set("repair", "true")
	}
	path := api.Prefix + "/node/scrub"
	c.s.scrub.begin(c.s, repair)
	answers, failed := askAll[api.ScrubState](ctx, c.s, question{Method: http.MethodPost, Path: path, Query: query.Encode()})
	tell := l.progress("content of all disks")
	for {
		answers[c.s.cfg.Node] = c.s.scrub.state(c.s)
		running, done := false, 1.0
		for _, st := range answers {
			running = running || st.Running
			done = min(done, st.Done)
		}
		tell(int64(done*1000), 1000)
		if !running {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(scrubEvery):
		}
		var silent map[string]error
		answers, silent = askAll[api.ScrubState](ctx, c.s, question{Method: http.MethodGet, Path: path})
		for node, err := range silent {
			failed[node] = err
		}
	}
	for node, st := range answers {
		if st.Error != "" {
			add(r, api.Problem{Kind: api.ProblemDisk, Node: node, Text: "its content could not be read in full: " + st.Error})
		}
	}
	for node, err := range failed {
		add(r, api.Problem{Kind: api.ProblemDisk, Node: node, Text: "its content was not read in full: " + err.Error()})
	}
	return nil
}
