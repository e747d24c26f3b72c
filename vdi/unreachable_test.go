package vdi_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// unreachable are objects of which those in one policy are not there until it is over.
type unreachable struct {
	vdi.Objects
	policy object.PolicyID
	over   atomic.Bool
	asked  atomic.Int32 // in vain
}

// within has a service work with them.
func (u *unreachable) within(c *vdi.Config) { u.Objects, c.Objects = c.Objects, u }

func (u *unreachable) reach(p object.PolicyID) error {
	if p != u.policy || u.over.Load() {
		return nil
	}
	u.asked.Add(1)
	return fmt.Errorf("node 7 is away: %w", object.ErrUnavailable)
}

func (u *unreachable) Submit(r *object.Request) {
	if err := u.reach(r.Policy); err != nil {
		r.Complete(err)
		return
	}
	u.Objects.Submit(r)
}

func (u *unreachable) Delete(ctx context.Context, d object.DeleteRequest) error {
	if err := u.reach(d.Policy); err != nil {
		return err
	}
	return u.Objects.Delete(ctx, d)
}

func (u *unreachable) Stat(ctx context.Context, p object.PolicyID, id object.ID) (object.Info, error) {
	if err := u.reach(p); err != nil {
		return object.Info{}, err
	}
	return u.Objects.Stat(ctx, p, id)
}

func (u *unreachable) List(ctx context.Context, p object.PolicyID, fn func(object.Info) error) error {
	if err := u.reach(p); err != nil {
		return err
	}
	return u.Objects.List(ctx, p, fn)
}

// What is not reachable keeps nobody's garbage: neither that of deleted VDIs nor that of a copy, nor what crashes left. It is
// tried once, for it is waited for, and collected when it is back.
func TestGarbageBesideWhatIsNotReachable(t *testing.T) {
	for away := vditest.Policy; away < vditest.Policy+vditest.MaxCopies; away++ {
		t.Run(fmt.Sprintf("policy %d", away), func(t *testing.T) {
			w := vditest.NewWorld(t)
			u := unreachable{policy: away}
			u.over.Store(true)
			w.Config = u.within
			s := w.Service()
			for copies := 1; copies <= vditest.MaxCopies; copies++ {
				for i := range 2 {
					name := fmt.Sprintf("of-%d-%d", copies, i)
					must[vdi.Info](t)(s.Create(ctx, vdi.CreateOptions{Name: name, Size: 4 << 20, Copies: copies}))
					v := open(t, s, name)
					write(t, v, 0, 2<<20, 1)
					if err := errors.Join(v.Flush(ctx), v.Close()); err != nil {
						t.Fatal(err)
					}
				}
				// What a crash has left, of a VDI that nobody knows.
				w.Objects.Put(vditest.Policy+object.PolicyID(copies-1), object.DataID(object.VID(0x700000+copies), 0), 20, 0, []byte("x"))
			}
			u.over.Store(false)
			for copies := 1; copies <= vditest.MaxCopies; copies++ {
				for i := range 2 {
					if err := s.Delete(ctx, fmt.Sprintf("of-%d-%d", copies, i), ""); err != nil {
						t.Fatal(err)
					}
				}
			}
			for range 2 {
				u.asked.Store(0)
				if err := s.Collect(ctx); !errors.Is(err, vdi.ErrUnavailable) {
					t.Errorf("collected: %v", err)
				}
				if n := u.asked.Load(); n != 1 {
					t.Errorf("what is away was tried %d times", n)
				}
			}
			if err := s.Sweep(ctx); !errors.Is(err, vdi.ErrUnavailable) {
				t.Errorf("swept: %v", err)
			}
			_ = s.Collect(ctx) // what the sweep has found
			for p := vditest.Policy; p < vditest.Policy+vditest.MaxCopies; p++ {
				if ids := w.Objects.In(p); (len(ids) > 0) != (p == away) {
					t.Errorf("policy %d still has %v", p, ids)
				}
			}
			u.over.Store(true)
			if err := errors.Join(s.Sweep(ctx), s.Collect(ctx)); err != nil {
				t.Error(err)
			}
			if ids := w.Objects.In(away); len(ids) > 0 {
				t.Errorf("in the end there still are %v", ids)
			}
		})
	}
}

// Objects that are not reachable keep no others of their VDI, however many there are.
func TestGarbageOfWhatIsReachableInPart(t *testing.T) {
	w := vditest.NewWorld(t)
	s := w.Service()
	v := create(t, s, "v", 64<<20)
	write(t, v, 0, 64<<20, 1)
	if err := errors.Join(v.Flush(ctx), v.Close(), s.Delete(ctx, "v", "")); err != nil {
		t.Fatal(err)
	}
	away := func(id object.ID) bool { kind, _ := id.Kind(); return kind == object.KindData && id.Index()%3 == 0 }
	tried := 0
	w.Objects.Fault = func(what string, id object.ID) error {
		if what == "delete" && away(id) {
			tried++
			return fmt.Errorf("node 7 is away: %w", object.ErrUnavailable)
		}
		return nil
	}
	for range 22 { // so many are away
		tried = 0
		if err := s.Collect(ctx); !errors.Is(err, vdi.ErrUnavailable) {
			t.Fatalf("collected: %v", err)
		}
		if tried != 1 {
			t.Fatalf("%d objects were waited for at a time", tried)
		}
	}
	for _, id := range w.Objects.In(vditest.Policy) {
		if kind, _ := id.Kind(); kind == object.KindData && !away(id) {
			t.Errorf("there still is %s", id)
		}
	}
	w.Objects.Fault = nil
	if err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	emptyOut(t, w, s, "in the end")
}

// A sweep, which may take long, keeps nobody's garbage.
func TestGarbageBesideSweep(t *testing.T) {
	w := vditest.NewWorld(t)
	began, over := make(chan struct{}), make(chan struct{})
	var once sync.Once
	w.Objects.Fault = func(what string, _ object.ID) error {
		if what == "list" {
			once.Do(func() { close(began) })
			<-over
		}
		return nil
	}
	s := w.Start()
	t.Cleanup(func() { close(over) }) // before it is waited for
	<-began
	v := create(t, s, "v", 4<<20)
	write(t, v, 0, 4<<20, 1)
	if err := errors.Join(v.Flush(ctx), v.Close(), s.Delete(ctx, "v", "")); err != nil {
		t.Fatal(err)
	}
	for began := time.Now(); len(w.Objects.In(vditest.Policy)) > 0; time.Sleep(time.Millisecond) {
		if time.Since(began) > time.Minute {
			t.Fatalf("there still are %v", w.Objects.In(vditest.Policy))
		}
	}
}
