package main

import (
	"bytes"
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"sheepdog/frontends/admin"
	"sheepdog/frontends/admin/admintest"
	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// rig is a sheep with real volumes, and dog against it. Its clock goes on by a minute with
// each call.
type rig struct {
	t        *testing.T
	sheep    *admintest.Sheep
	volumes  *vdi.Service
	world    *vditest.World
	program  string
	dir      string
	terminal bool // everything is one
	env      map[string]string

	mu  sync.Mutex
	now time.Time
}

func newRig(t *testing.T) *rig { return newRigWith(t, nil) }

func newRigWith(t *testing.T, change func(*admin.Config)) *rig {
	t.Helper()
	r := &rig{t: t, program: "dog", dir: t.TempDir(), now: admintest.Then, env: map[string]string{}}
	r.world = vditest.NewWorld(t)
	r.world.Config = func(c *vdi.Config) { c.Now = r.clock }
	r.volumes = r.world.Start()
	r.sheep = admintest.Start(t, r.volumes, change)
	return r
}

func (r *rig) clock() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.now
}

func (r *rig) tick() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.now = r.now.Add(time.Minute)
}

// result is what came of one call.
type result struct {
	code     int
	out, err string
}

func (r *rig) dog(args ...string) result { return r.dogWith("", args...) }

func (r *rig) dogWith(stdin string, args ...string) result {
	r.t.Helper()
	r.tick()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var out, err bytes.Buffer
	code := run(ctx, world{
		args: append([]string{r.program}, args...), in: strings.NewReader(stdin), out: &out, err: &err, zone: time.UTC,
		getenv: func(key string) string {
			if v, ok := r.env[key]; ok || key != "DOG_ADDRESS" {
				return v
			}
			return r.sheep.Address
		},
		terminal: func(any) bool { return r.terminal },
	})
	if ctx.Err() != nil {
		r.t.Fatalf("dog %s hangs", strings.Join(args, " "))
	}
	return result{code, out.String(), err.String()}
}

// content is n bytes that are not zero anywhere, and differ by seed.
func content(seed byte, n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7)%251 + 1 + seed%4
	}
	return string(b)
}
