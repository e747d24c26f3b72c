package admin

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"sheepdog/frontends/admin/api"
)

// A call that only another node can answer is asked of it over the connections between
// nodes: so operators need no more than one node's address, and no token of others. Who
// brought a call to a node of the cluster is believed by all of them.

// question is a call that another node answers. It travels as JSON.
type question struct {
	Method string `json:"method"`
	Path   string `json:"path"`
	Query  string `json:"query"`
	Body   []byte `json:"body,omitempty"`
}

// The answer travels as status, uint16 little-endian, and the body.
const answerHead = 2

// askTimeout bounds how long a node may take that is one of many that are asked.
const askTimeout = 5 * time.Second

// forward has another node answer the call.
func (c *call) forward(node string) error {
	body, err := io.ReadAll(http.MaxBytesReader(c.w, c.r.Body, maxJSON))
	if err != nil {
		return refuse(api.KindInvalid, "read the body: %v", err)
	}
	query := c.r.URL.Query()
	query.Del(paramNode.name)
	status, answer, err := c.s.ask(c.r.Context(), node, question{Method: c.r.Method, Path: c.r.URL.Path, Query: query.Encode(), Body: body})
	if err != nil {
		return err
	}
	c.w.Header().Set("Cache-Control", "no-store")
	c.w.Header().Set("Content-Type", api.TypeJSON)
	c.w.WriteHeader(status)
	_, err = c.w.Write(answer)
	return err
}

// ask asks another node.
func (s *Server) ask(ctx context.Context, node string, q question) (status int, answer []byte, err error) {
	n, ok := s.nodeCalled(node)
	if !ok {
		return 0, nil, noSuchNode(node)
	}
	b, err := json.Marshal(q)
	if err != nil {
		return 0, nil, fmt.Errorf("encode a question: %w", err)
	}
	b, err = s.cfg.Cluster.Ask(ctx, n.Name, b)
	if err != nil {
		return 0, nil, err
	}
	if len(b) < answerHead {
		return 0, nil, fmt.Errorf("the answer of node %q makes no sense", n.Name)
	}
	return int(binary.LittleEndian.Uint16(b)), b[answerHead:], nil
}

// Answer answers a question that another node's Server has asked. It never fails: failures
// are answers.
func (s *Server) Answer(ctx context.Context, from string, b []byte) []byte {
	status, answer, err := s.answer(ctx, from, b)
	if err != nil {
		e := errorOf(err)
		status = statusOf(e.Kind)
		answer, _ = json.Marshal(e) // texts alone: it cannot fail
	}
	return append(binary.LittleEndian.AppendUint16(nil, uint16(status)), append(answer, '\n')...)
}

func (s *Server) answer(ctx context.Context, from string, b []byte) (status int, answer []byte, err error) {
	var q question
	if err := json.Unmarshal(b, &q); err != nil {
		return 0, nil, refuse(api.KindInvalid, "the question of node %q makes no sense: %v", from, err)
	}
	routes := slices.Concat(nodeRoutes, betweenRoutes)
	i := slices.IndexFunc(routes, func(r route) bool { return r.perNode && r.method == q.Method && r.path == q.Path })
	if i < 0 {
		return 0, nil, refuse(api.KindNoRoute, "node %q runs a version that has no %s %s for other nodes", s.cfg.Node, q.Method, q.Path)
	}
	r, err := http.NewRequestWithContext(ctx, q.Method, q.Path, bytes.NewReader(q.Body))
	if err != nil {
		return 0, nil, refuse(api.KindInvalid, "the question of node %q makes no sense: %v", from, err)
	}
	r.URL.RawQuery, r.RemoteAddr = q.Query, "node "+from
	c := &call{s: s, w: &recorder{}, r: r}
	if err := c.checkQuery(&routes[i]); err != nil {
		return 0, nil, err
	}
	v, err := routes[i].answers(c)
	if err != nil {
		return 0, nil, err
	}
	if answer, err = json.Marshal(v); err != nil {
		return 0, nil, fmt.Errorf("encode the answer: %w", err)
	}
	return routes[i].success(), answer, nil
}

// askAll asks all other nodes that are up at once; failed has the errors of those that did
// not answer.
func askAll[T any](ctx context.Context, s *Server, q question) (answers map[string]T, failed map[string]error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	answers, failed = map[string]T{}, map[string]error{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, n := range s.cfg.Cluster.Nodes() {
		if n.Self || n.State != api.NodeUp {
			continue
		}
		wg.Go(func() {
			v, err := askOne[T](ctx, s, n.Name, q)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed[n.Name] = err
				return
			}
			answers[n.Name] = v
		})
	}
	wg.Wait()
	return answers, failed
}

func askOne[T any](ctx context.Context, s *Server, node string, q question) (v T, err error) {
	status, answer, err := s.ask(ctx, node, q)
	if err != nil {
		return v, err
	}
	if status/100 != 2 {
		e := new(api.Error)
		if err := json.Unmarshal(answer, e); err != nil {
			return v, fmt.Errorf("the answer of node %q makes no sense: %w", node, err)
		}
		return v, e
	}
	if err := json.Unmarshal(answer, &v); err != nil {
		return v, fmt.Errorf("the answer of node %q makes no sense: %w", node, err)
	}
	return v, nil
}

// allDisks are the disks that the cluster knows, with what their nodes say of them.
func (c *call) allDisks() (any, error) { return c.s.everyDisk(c.r.Context()), nil }

func (s *Server) everyDisk(ctx context.Context) []api.Disk {
	answers, failed := askAll[[]api.Disk](ctx, s, question{Method: http.MethodGet, Path: api.Prefix + "/node/disks"})
	answers[s.cfg.Node] = s.disks()
	known := map[string]api.Disk{}
	for _, list := range answers {
		for _, d := range list {
			known[d.ID] = d
		}
	}
	list := []api.Disk{}
	for _, d := range s.cfg.Cluster.Disks() {
		if told, ok := known[d.ID]; ok {
			list = append(list, told)
			delete(known, d.ID)
			continue
		}
		d.State, d.Corrupt, d.Errors = api.DiskUnknown, []api.CorruptObject{}, map[string]uint64{}
		if d.Reason = "its node is down"; failed[d.Node] != nil {
			d.Reason = "its node does not answer: " + failed[d.Node].Error()
		}
		list = append(list, d)
	}
	for _, d := range known { // before the cluster is formatted
		list = append(list, d)
	}
	slices.SortStableFunc(list, func(a, b api.Disk) int {
		if x := strings.Compare(a.Node, b.Node); x != 0 {
			return x
		}
		return strings.Compare(a.Path, b.Path)
	})
	return list
}

// Free is how much is free on the disks of all nodes, if all of them are known.
func (s *Server) Free(ctx context.Context) (bytes int64, known bool) {
	for _, d := range s.everyDisk(ctx) {
		if d.State == api.DiskUnknown {
			return 0, false
		}
		if d.State == api.DiskOK {
			bytes += d.FreeBytes
		}
	}
	return bytes, true
}

// allSessions are the clients of all nodes.
func (c *call) allSessions() (any, error) {
	answers, failed := askAll[[]api.Session](c.r.Context(), c.s, question{Method: http.MethodGet, Path: api.Prefix + "/sessions"})
	var errs []error
	for _, err := range failed {
		errs = append(errs, err)
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	list := c.s.sessions()
	for _, more := range answers {
		list = append(list, more...)
	}
	slices.SortStableFunc(list, func(a, b api.Session) int { return a.Started.Compare(b.Started) })
	return list, nil
}
