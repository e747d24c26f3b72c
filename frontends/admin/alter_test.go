package admin_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"sheepdog/frontends/admin/admintest"
	"sheepdog/frontends/admin/api"
	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// altered are volumes of a node that count how often they alter copies, and may say or do something else.
type altered struct {
	*vdi.Service
	times  atomic.Int32
	writer string // if set
	alter  func(ctx context.Context, begun func(vdi.Altered) error, p vdi.Progress) error
}

func (v *altered) Writer(ctx context.Context, name string) (string, error) {
	if v.writer != "" {
		return v.writer, nil
	}
	return v.Service.Writer(ctx, name)
}

func (v *altered) AlterCopies(ctx context.Context, name string, copies int, begun func(vdi.Altered) error, p vdi.Progress) (vdi.Altered, error) {
	v.times.Add(1)
	if v.alter != nil {
		return vdi.Altered{From: 1, To: copies}, v.alter(ctx, begun, p)
	}
	return v.Service.AlterCopies(ctx, name, copies, begun, p)
}

// alterers are n1, whose API the client calls, and n2, with a VDI that is written through n2.
func alterers(t *testing.T) (n1, n2 *altered, c *api.Client) {
	t.Helper()
	w := vditest.NewCluster(t, 1)
	g1, g2 := w.Gateway("n1"), w.Gateway("n2")
	_, err := g2.Create(t.Context(), vdi.CreateOptions{Name: "v", Size: 4 << 20})
	v, err1 := g2.Open(t.Context(), "v", "", vdi.OpenOptions{Client: "test"})
	if err := errors.Join(err, err1); err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if _, err := v.WriteAt(t.Context(), make([]byte, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	n1, n2 = &altered{Service: g1.Service}, &altered{Service: g2.Service}
	s := admintest.Start(t, n1, nil)
	s.Join(t, n2)
	if c, err = api.New(s.Address, api.Options{}); err != nil {
		t.Fatal(err)
	}
	return n1, n2, c
}

// expectTimes fails unless n1 and n2 have begun to alter copies so often.
func expectTimes(t *testing.T, n1, n2 *altered, want1, want2 int32) {
	t.Helper()
	if a, b := n1.times.Load(), n2.times.Load(); a != want1 || b != want2 {
		t.Errorf("n1 has altered copies %d times, n2 %d times; want %d and %d", a, b, want1, want2)
	}
}

// Copies are altered by the node that writes the VDI, whichever is asked; its client is told all that it is told there.
func TestAlterCopiesThroughWriter(t *testing.T) {
	n1, n2, c := alterers(t)
	var begun []api.Altered
	a, err := c.AlterCopies(t.Context(), "v", 3, func(b api.Altered) { begun = append(begun, b) }, nil)
	if err != nil || a.From != 1 || a.To != 3 || a.Copied == 0 || len(begun) != 1 || len(begun[0].VDIs) != 1 {
		t.Errorf("%+v, %v, begun %+v", a, err, begun)
	}
	expectTimes(t, n1, n2, 0, 1)

	var last api.Progress
	far := make(chan struct{})
	n2.alter = func(_ context.Context, begun func(vdi.Altered) error, p vdi.Progress) error {
		begun(vdi.Altered{})
		for n := int64(0); ; n++ {
			p(n, 7)
			select {
			case <-far:
				return nil
			case <-time.After(time.Millisecond):
			}
		}
	}
	if _, err = c.AlterCopies(t.Context(), "v", 2, nil, func(p api.Progress) {
		if last == (api.Progress{}) {
			close(far)
		}
		last = p
	}); err != nil || last.Total != 7 || last.What != "v" {
		t.Errorf("progress %+v, %v", last, err)
	}
	_, err = c.AlterCopies(t.Context(), "none", 2, nil, nil)
	if e, ok := errors.AsType[*api.Error](err); !ok || e.Kind != api.KindNotFound {
		t.Errorf("of nothing: %v", err)
	}
}

// A client that goes ends it there.
func TestAlterCopiesThroughWriterGivenUp(t *testing.T) {
	n1, n2, c := alterers(t)
	ended := make(chan error)
	n2.alter = func(ctx context.Context, begun func(vdi.Altered) error, _ vdi.Progress) error {
		err := begun(vdi.Altered{})
		<-ctx.Done()
		ended <- err
		return ctx.Err()
	}
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := c.AlterCopies(ctx, "v", 3, func(api.Altered) { cancel() }, nil); err == nil {
		t.Error("it was through")
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("it goes on")
	}
	expectTimes(t, n1, n2, 0, 1)
}

// What is asked of another node is asked once: not again, when that finds that others write; and here, when that is
// down. Who fails says all that is known.
func TestAlterCopiesNotPassedOnTwice(t *testing.T) {
	elsewhere := func(node string) func(context.Context, func(vdi.Altered) error, vdi.Progress) error {
		return func(_ context.Context, begun func(vdi.Altered) error, _ vdi.Progress) error {
			return errors.Join(begun(vdi.Altered{}), &vdi.Elsewhere{Node: node})
		}
	}
	for _, x := range []struct {
		what           string
		writer         string
		alter1, alter2 string // where they find that it is written
		times1, times2 int32
		says           []string // nothing: it goes well
	}{
		{"both are wrong about the other", "n2", "n2", "n1", 0, 1, []string{"in use"}},
		{"this node thought it could", "-", "n2", "", 1, 1, nil},
		{"several write", "-", "n2", "n1", 1, 1, []string{"in use", `through node "n2"`}},
		{"who writes is down", "n3", "", "", 1, 0, nil},
		{"who writes does not answer", "g4", "", "", 0, 0, []string{`"g4"`, "no answer", "as before"}},
	} {
		t.Run(x.what, func(t *testing.T) {
			n1, n2, c := alterers(t)
			n1.writer = x.writer // "-" is no node
			if x.alter1 != "" {
				n1.alter = elsewhere(x.alter1)
			}
			if x.alter2 != "" {
				n2.alter = elsewhere(x.alter2)
			}
			begun := 0
			_, err := c.AlterCopies(t.Context(), "v", 2, func(api.Altered) { begun++ }, nil)
			expectTimes(t, n1, n2, x.times1, x.times2)
			if (err == nil) != (len(x.says) == 0) || begun > 1 {
				t.Errorf("%v; told of the beginning %d times", err, begun)
			}
			for _, text := range x.says {
				if e, ok := errors.AsType[*api.Error](err); !ok || !strings.Contains(e.Message+e.Hint, text) {
					t.Errorf("%+v does not say %q", err, text)
				}
			}
		})
	}
}

// A node whose question is lost, or that has gone, is waited for some time; what it wanted ends then.
func TestAlteringOfNodeThatHasGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := make(chan struct{})
		v := &altered{alter: func(ctx context.Context, _ func(vdi.Altered) error, p vdi.Progress) error {
			p(1, 2)
			<-ctx.Done()
			close(ended)
			return ctx.Err()
		}}
		s, err := admintest.LoneWith(v)
		if err != nil {
			t.Fatal(err)
		}
		ask := func(method, query, body string) string {
			b, _ := json.Marshal(map[string]any{"method": method, "path": "/api/v1/node/alterings", "query": query, "body": []byte(body)})
			answer := s.Answer(t.Context(), "n2", b)
			synctest.Wait()
			return string(answer[2:])
		}
		for range 2 { // the second time the answer was lost
			if answer := ask(http.MethodPost, "", `{"id":"x","name":"v","copies":2}`); strings.Contains(answer, "kind") {
				t.Fatal(answer)
			}
		}
		for range 10 {
			time.Sleep(10 * time.Second)
			if answer := ask(http.MethodGet, "id=x", ""); !strings.Contains(answer, `"progress":{"done":1,"total":2`) {
				t.Fatal(answer)
			}
		}
		time.Sleep(20 * time.Second)
		<-ended
		synctest.Wait()
		if answer := ask(http.MethodGet, "id=x", ""); !strings.Contains(answer, string(api.KindNotFound)) || v.times.Load() != 1 {
			t.Errorf("%s; begun %d times", answer, v.times.Load())
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}
