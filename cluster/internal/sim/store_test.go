package sim

import (
	"context"
	"time"

	"sheepdog/storage/object"
)

// slowStore is a node's store, whose operations take time.
type slowStore struct{ l *life }

// duration is how long the disk takes.
func (n *node) duration() time.Duration {
	w := n.w
	if n.slow && w.chance(0.3) {
		return w.between(100*ms, 1500*ms)
	}
	return w.between(ms/50, 3*ms)
}

// Submit implements replicas.Store: the operation is carried out after some time, and
// known to have ended some time after that.
func (s *slowStore) Submit(r *object.Request) {
	l := s.l
	l.n.w.note(func() {
		if l.store == nil && r.Op == object.OpSync {
			r.Complete(nil)
			return
		}
		if l.over || l.store == nil {
			r.Complete(object.ErrClosed)
			return
		}
		paid := l.owe(func() { r.Complete(object.ErrClosed) })
		l.n.w.after(l.n.duration(), func() {
			l.whenAwake(func() { s.carryOut(r, paid) })
		})
	})
}

func (s *slowStore) carryOut(r *object.Request, paid func()) {
	l, w := s.l, s.l.n.w
	o := *r
	o.Next, o.Owner = nil, nil
	o.Done = func(o *object.Request) {
		if o.Err == nil {
			w.note(func() {
				if !l.over {
					l.stored(o.Op, o.Len)
				}
			})
		}
		w.note(func() {
			w.after(l.n.duration()/4, func() {
				l.whenAwake(func() {
					paid()
					if o.Err == nil && o.Op != object.OpSync && w.tracing {
						w.logf("%s: %s %s %d: %s", l.n.name, opNames[o.Op], o.ID, o.Off/sector, valuesIn(o.Data))
					}
					r.Complete(o.Err)
					l.kick()
				})
			})
		})
	}
	l.store.Submit(&o)
	l.store.Kick()
}

var opNames = [...]string{object.OpRead: "read", object.OpWrite: "stored", object.OpZero: "zeroed", object.OpDiscard: "discarded"}

// Kick implements replicas.Store. Operations are kicked when they are carried out.
func (s *slowStore) Kick() {}

// wait lets an operation that is not a request take its time.
func (s *slowStore) wait() error {
	l := s.l
	ch := make(chan struct{})
	l.n.w.note(func() {
		if l.over || l.store == nil {
			close(ch)
			return
		}
		paid := l.owe(func() { close(ch) })
		l.n.w.after(l.n.duration(), func() {
			l.whenAwake(func() {
				paid()
				close(ch)
			})
		})
	})
	<-ch
	select {
	case <-l.ended:
		return object.ErrClosed
	default:
	}
	if l.store == nil {
		return object.ErrUnavailable
	}
	return nil
}

func (s *slowStore) Delete(ctx context.Context, k object.Key) error {
	if err := s.wait(); err != nil {
		return err
	}
	if err := s.l.store.Delete(ctx, k); err != nil {
		return err
	}
	return s.wait()
}

func (s *slowStore) Sums(ctx context.Context, k object.Key) ([]uint64, error) {
	if err := s.wait(); err != nil {
		return nil, err
	}
	return s.l.store.Sums(ctx, k)
}

func (s *slowStore) Stat(ctx context.Context, k object.Key) (object.Info, error) {
	if err := s.wait(); err != nil {
		return object.Info{}, err
	}
	return s.l.store.Stat(ctx, k)
}

func (s *slowStore) List(ctx context.Context, g object.Group, fn func(object.Info) error) error {
	if err := s.wait(); err != nil {
		return err
	}
	return s.l.store.List(ctx, g, fn)
}

func (s *slowStore) Groups(ctx context.Context) ([]object.Group, error) {
	if s.l.store == nil {
		return nil, nil
	}
	return s.l.store.Groups(ctx)
}

// Tight implements replicas.Store.
func (s *slowStore) Tight(g object.Group) bool { return s.l.store != nil && s.l.store.Tight(g) }

// Failed implements replicas.Store: no disk fails here.
func (s *slowStore) Failed(object.Group) bool { return false }

// Abandon implements replicas.Store.
func (s *slowStore) Abandon(object.Group) bool { return false }

// Rotten implements replicas.Store.
func (s *slowStore) Rotten() map[object.Key][]uint32 {
	if s.l.over || s.l.store == nil {
		return nil
	}
	return s.l.store.Rotten()
}

// RottenBlocks implements what replicas ask of a store that knows.
func (s *slowStore) RottenBlocks(k object.Key) []uint32 {
	if s.l.over || s.l.store == nil {
		return nil
	}
	return s.l.store.RottenBlocks(k)
}

// Heal implements replicas.Store.
func (s *slowStore) Heal(ctx context.Context, k object.Key, block uint32, data []byte) error {
	if err := s.wait(); err != nil {
		return err
	}
	if s.l.over || s.l.store == nil {
		return object.ErrClosed
	}
	return s.l.store.Heal(ctx, k, block, data)
}

// keepMarksNow is what replicas want before what they have is gone.
func (l *life) keepMarksNow(context.Context) error {
	marks := l.reps.Marks()
	done := make(chan error, 1)
	(&slowStore{l}).Submit(&object.Request{Op: object.OpSync, Done: func(r *object.Request) {
		if r.Err != nil || l.over {
			done <- object.ErrClosed
			return
		}
		done <- l.store.KeepMarks(marks)
	}})
	return <-done
}
