package vditest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/catalog"
)

// Policy is the policy of the volumes.
const Policy object.PolicyID = 1

// MaxCopies is how many copies there may be: copies-1 above Policy is the policy that keeps them.
const MaxCopies = 3

func policyOf(_ context.Context, copies int) (object.PolicyID, error) {
	if copies < 1 || copies > MaxCopies {
		return 0, fmt.Errorf("%d copies: %w", copies, object.ErrInvalid)
	}
	return Policy + object.PolicyID(copies-1), nil
}

func copiesOf(p object.PolicyID) int { return int(p-Policy) + 1 }

func allPolicies() []object.PolicyID { return []object.PolicyID{Policy, Policy + 1, Policy + 2} }

// New returns the service of an empty world, running until the test ends.
func New(t testing.TB) *vdi.Service {
	t.Helper()
	return NewWorld(t).Start()
}

// World is what outlives a sheep: the objects, the catalog, and how often it was started.
type World struct {
	Objects     *Objects
	Catalog     *catalog.Machine
	Incarnation uint64
	Config      func(*vdi.Config) // changes the configuration of services, if set

	t  testing.TB
	mu sync.Mutex // orders commands
}

// NewWorld returns an empty world.
func NewWorld(t testing.TB) *World {
	return &World{Objects: NewObjects(), Catalog: catalog.New(), t: t}
}

// Propose implements vdi.Log. What it has answered is durable.
func (w *World) Propose(ctx context.Context, machine string, command []byte) ([]byte, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if machine != vdi.Machine {
		w.t.Errorf("proposed to machine %q", machine)
	}
	if err := w.Objects.Step(); err != nil {
		return nil, err
	}
	return w.Catalog.Apply(command), nil
}

// Service returns a new incarnation's service, which does not run.
func (w *World) Service() *vdi.Service {
	w.t.Helper()
	w.Incarnation++
	incarnation := w.Incarnation
	cfg := vdi.Config{
		Objects: w.Objects, Log: w, Catalog: w.Catalog, Node: "n1", Incarnation: func() uint64 { return incarnation },
		DefaultPolicy: func() object.PolicyID { return Policy },
		PolicyOf:      policyOf, CopiesOf: copiesOf, Policies: allPolicies,
		Lost: func(object.PolicyID) uint64 { return w.Objects.Restarts() },
	}
	if w.Config != nil {
		w.Config(&cfg)
	}
	s, err := vdi.NewService(cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// Start returns a new incarnation's service, running until the test ends.
func (w *World) Start() *vdi.Service {
	w.t.Helper()
	s := w.Service()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("Run: %v", err)
		}
	})
	return s
}

// Crash leaves of the objects what a crash leaves: see Objects.Crash. The services
// before are of no use any more.
func (w *World) Crash(rng *rand.Rand, keep float64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.Objects = w.Objects.Crash(rng, keep)
}
