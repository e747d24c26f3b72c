package iscsi

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sheepdog/frontends/iscsi/access"
	"sheepdog/frontends/iscsi/internal/pdu"
)

// rules are Targets that a test changes.
type rules struct {
	mu    sync.Mutex
	store *store
	list  []access.Target
}

func (r *rules) Target(name string) (access.Target, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.list, func(t access.Target) bool { return t.Name == name })
	if i < 0 {
		return access.Target{}, false
	}
	return r.list[i], true
}

func (r *rules) Groups() (list []access.Target) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.list {
		if t.Group {
			list = append(list, t)
		}
	}
	return list
}

func (r *rules) set(t access.Target, err error) {
	if err != nil {
		panic(err)
	}
	r.mu.Lock()
	r.list = append(slices.DeleteFunc(r.list, func(x access.Target) bool { return x.Name == t.Name }), t)
	r.mu.Unlock()
	r.store.changes.Add(1)
}

func (r *rules) remove(name string) {
	r.mu.Lock()
	r.list = slices.DeleteFunc(r.list, func(x access.Target) bool { return x.Name == name })
	r.mu.Unlock()
	r.store.changes.Add(1)
}

// serveRules serves with rules and two credentials.
func serveRules(t *testing.T, change func(*Config)) (*harness, *rules) {
	r := &rules{}
	h := serve(t, func(c *Config) {
		r.store = c.Volumes.(*store)
		c.Targets = r
		c.PingEvery = 4 * time.Second // upkeep looks every second
		c.Secrets = func(name string) (string, string, error) {
			if s, ok := map[string]string{"in": "correct horse battery", "out": "staple staple staple"}[name]; ok {
				return map[string]string{"in": "joe", "out": "target"}[name], s, nil
			}
			return "", "", errors.New("no such file")
		}
		if change != nil {
			change(c)
		}
	})
	h.pong = true
	return h, r
}

// to addresses a command to another unit.
func to(h pdu.Header, lun byte) pdu.Header {
	h[9] = lun
	return h
}

func (c *client) luns() (list []byte) {
	c.t.Helper()
	c.send(c.command(fRead, 512, 0xa0, 0, 0, 0, 0, 0, 0, 0, 2, 0), nil)
	r := c.finish()
	if r.status != 0 || len(r.data) != 8+int(binary.BigEndian.Uint32(r.data)) {
		c.t.Fatalf("report luns: %v", r)
	}
	for b := r.data[8:]; len(b) > 0; b = b[8:] {
		list = append(list, b[1])
	}
	return list
}

// until sends TEST UNIT READY to a unit until it reports what is wanted, and fails if it does not.
func (c *client) until(lun byte, sense [3]byte) {
	c.t.Helper()
	for range 300 {
		c.send(to(c.command(pdu.FlagFinal, 0, 0), lun), nil)
		if r := c.finish(); r.sense == sense {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.t.Fatalf("unit %d never reports %x", lun, sense)
}

func group(t *testing.T) access.Target {
	g := access.Target{Name: "disks", Group: true}
	g, _, err := g.Add(0, "vm1", "")
	if err == nil {
		g, _, err = g.Add(5, "vm2", "")
	}
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// Several units in one target: each has its own content, attentions and resets; what the group has
// changes under the session.
func TestGroup(t *testing.T) {
	h, r := serveRules(t, nil)
	r.set(group(t), nil)
	c := h.login("disks", me)
	if got := c.luns(); !bytes.Equal(got, []byte{0, 5}) {
		t.Fatalf("units %v", got)
	}
	c.until(0, [3]byte{})
	c.until(5, [3]byte{})
	// What is written to one is not in the other, whatever way it is addressed.
	one, two := pattern(4096, 1), pattern(4096, 2)
	if res := c.write(8, one); res.status != 0 {
		t.Fatal(res)
	}
	c.send(to(c.command(fWrite, 4096, rw(0x2a, 8, 8)...), 5), two)
	if res := c.finish(); res.status != 0 {
		t.Fatal(res)
	}
	flat := c.command(fRead, 4096, rw(0x28, 8, 8)...)
	flat[8], flat[9] = 0x40, 5
	c.send(flat, nil)
	if res := c.finish(); !bytes.Equal(res.data, two) || !bytes.Equal(c.read(8, 8), one) {
		t.Error("the units have each other's content")
	}
	c.send(to(c.command(fRead, 4096, rw(0x28, 8, 8)...), 1), nil)
	if res := c.finish(); res.sense != [3]byte{5, 0x25, 0} {
		t.Errorf("a unit that is not there: %v", res)
	}
	// The identity of a unit is that of the volume, the port is the group's.
	c.send(to(c.command(fRead, 255, 0x12, 1, 0x83, 0, 255, 0), 5), nil)
	if res := c.finish(); !bytes.Contains(res.data, []byte(prefix+":disks,t,0x0001")) {
		t.Errorf("identification without the target's name: %q", res.data)
	}
	// A reset of one is told on that one.
	q := c.request(pdu.OpTask, pdu.FlagFinal|pdu.TaskLUNReset)
	q[9] = 5
	c.send(q, nil)
	if a, _ := c.recv(); a.Op() != pdu.OpTaskAnswer || a[2] != pdu.TaskComplete {
		t.Fatalf("lun reset: opcode %#x, response %d", a.Op(), a[2])
	}
	c.send(c.command(pdu.FlagFinal, 0, 0), nil)
	if res := c.finish(); res.status != 0 {
		t.Errorf("the other unit reports %v", res)
	}
	c.until(5, [3]byte{6, 0x29, 3})

	// One less, one more.
	g, err := group(t).Remove(5)
	r.set(g, err)
	c.until(0, [3]byte{6, 0x3f, 0x0e})
	if got := c.luns(); !bytes.Equal(got, []byte{0}) {
		t.Errorf("units %v after one was removed", got)
	}
	g, _, err = g.Add(7, "vm2", "")
	r.set(g, err)
	c.until(7, [3]byte{6, 0x29, 0})
	if got := c.luns(); !bytes.Equal(got, []byte{0, 7}) {
		t.Errorf("units %v after one was added", got)
	}
	// The list was read: it needs to be told no more.
	c.send(c.command(pdu.FlagFinal, 0, 0), nil)
	if res := c.finish(); res.status != 0 {
		t.Errorf("after REPORT LUNS: %v", res)
	}
	r.remove("disks")
	c.gone()
}

// A unit that is removed is closed when the last command that uses it has ended, not before.
func TestRemoveBusyLUN(t *testing.T) {
	h, r := serveRules(t, nil)
	r.set(group(t), nil)
	c := h.login("disks", me)
	c.until(5, [3]byte{})
	d := h.store.disks["vm2"]
	hold := make(chan struct{})
	d.mu.Lock()
	d.hold = hold
	d.mu.Unlock()
	read := to(c.command(fRead, 4096, rw(0x28, 0, 8)...), 5)
	c.send(read, nil)
	for d.held.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	g, err := group(t).Remove(5)
	r.set(g, err)
	c2 := h.login("vm1", "iqn.other:x")
	c2.ready()
	for n := 0; h.unitCount() != 1; n++ { // the group's unit is forgotten by then
		if n == 300 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if n := h.store.opens.Load(); n != 3 { // two by the group, one by the other
		t.Errorf("%d volumes are open while a command uses one", n)
	}
	close(hold)
	if res := c.finish(); res.status != 0 || len(res.data) != 4096 {
		t.Errorf("the command under way: %v", res)
	}
	for n := 0; h.store.opens.Load() != 2; n++ {
		if n == 3000 {
			t.Fatalf("%d volumes are open in the end", h.store.opens.Load())
		}
		time.Sleep(time.Millisecond)
	}
}

func (h *harness) unitCount() int {
	h.Server.mu.Lock()
	defer h.Server.mu.Unlock()
	return len(h.Server.units)
}

// Sessions that end while their group changes leave nothing behind.
func TestGroupChurn(t *testing.T) {
	h, r := serveRules(t, nil)
	r.set(group(t), nil)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			case <-time.After(3 * time.Millisecond):
			}
			g := group(t)
			if n%2 == 0 {
				g, _ = g.Remove(5)
			}
			r.set(g, nil)
		}
	})
	for range 60 {
		c := h.login("disks", me)
		c.send(c.command(pdu.FlagFinal, 0, 0), nil)
		c.finish()
		time.Sleep(5 * time.Millisecond)
		c.conn.Close()
	}
	close(stop)
	wg.Wait()
	// The harness checks that no volume is open after Shutdown.
}

// Who is let in, by name, network and secret; what is not let in does not see the target either.
func TestAccess(t *testing.T) {
	h, r := serveRules(t, nil)
	h.store.snapshot("vm1", "daily")
	try := func(target, who string) pdu.LoginStatus { return h.dial().tryLogin(target, who, 1) }
	only, err := access.Target{Name: "vm1"}.Allow([]string{me})
	r.set(only, err)
	for _, c := range []struct {
		target, who string
		want        pdu.LoginStatus
	}{
		{"vm1", me, pdu.LoginOK}, {"vm1", strings.ToUpper(me), pdu.LoginOK}, {"vm1", me + "x", pdu.LoginForbidden},
		{"vm1.daily", me + "x", pdu.LoginForbidden}, {"vm1.daily", me, pdu.LoginOK}, {"vm2", me + "x", pdu.LoginOK},
	} {
		if got := try(c.target, c.who); got != c.want {
			t.Errorf("%s to %s: status %#x, want %#x", c.who, c.target, uint16(got), uint16(c.want))
		}
	}
	list := h.sendTargets(me + "x")
	if slices.Contains(list, prefix+":vm1") || slices.Contains(list, prefix+":vm1.daily") || !slices.Contains(list, prefix+":vm2") {
		t.Errorf("who is not let in sees %v", list)
	}
	r.set(group(t), nil)
	if list := h.sendTargets(me); !slices.Contains(list, prefix+":vm1") || !slices.Contains(list, prefix+":disks") {
		t.Errorf("who is let in sees %v", list)
	}
	elsewhere, err := access.Target{Name: "vm1"}.Allow([]string{"192.0.2.0/24"})
	r.set(elsewhere, err)
	if got := try("vm1", me); got != pdu.LoginForbidden {
		t.Errorf("from another network: status %#x", uint16(got))
	}
}

func (h *harness) sendTargets(who string) (list []string) {
	c := h.login("", who)
	c.send(c.request(pdu.OpText, pdu.FlagFinal), text("SendTargets=All"))
	_, b := c.recv()
	for _, line := range bytes.Split(b, []byte{0}) {
		if name, ok := strings.CutPrefix(string(line), "TargetName="); ok {
			list = append(list, name)
		}
	}
	return list
}

// Secrets by target and by initiator. Where a secret is missing nobody is let in.
func TestTargetChap(t *testing.T) {
	h, r := serveRules(t, nil)
	with, err := access.Target{Name: "vm1"}.WithChap(access.Chap{Credential: "in", Mutual: "out"})
	r.set(with, err)
	if s := h.dial().chap("joe", "correct horse battery"); s != pdu.LoginOK {
		t.Errorf("the right secret: status %#x", uint16(s))
	}
	if s := h.dial().chap("joe", "wrong"); s != pdu.LoginAuthentication {
		t.Errorf("a wrong secret: status %#x", uint16(s))
	}
	if s := h.dial().tryLogin("vm1", me, 1); s != pdu.LoginAuthentication {
		t.Errorf("no secret: status %#x", uint16(s))
	}
	if s := h.dial().tryLogin("vm2", me, 1); s != pdu.LoginOK {
		t.Errorf("another target: status %#x", uint16(s))
	}
	for _, who := range []string{"", me} {
		missing, err := with.WithChap(access.Chap{Initiator: who, Credential: "gone"})
		r.set(missing, err)
		for _, secret := range []string{"correct horse battery", ""} {
			if s := h.dial().chap("joe", secret); s != pdu.LoginAuthentication {
				t.Errorf("a secret that is missing for %q: status %#x", who, uint16(s))
			}
		}
	}
}

// Logout asks the initiators that are meant to log out, and ends the sessions of those that do not.
func TestKick(t *testing.T) {
	h, r := serveRules(t, nil)
	r.set(group(t), nil)
	a, b := h.login("vm1", me), h.login("vm2", me)
	a.ready()
	b.ready()
	if n := h.Logout(func(i SessionInfo) bool { return i.Target == prefix+":vm1" }); n != 1 {
		t.Fatalf("%d sessions", n)
	}
	if q, data := a.recv(); q.Op() != pdu.OpAsync || len(data) > 0 || q[36] != pdu.AsyncLogout {
		t.Errorf("opcode %#x, event %d", q.Op(), q[36])
	}
	a.gone()
	b.ready()
	waitFor(t, func() bool {
		list := h.Sessions()
		return len(list) == 1 && list[0].Target == prefix+":vm2"
	})
}

// A VDI by its own target and by a group's are two ports: what one has reserved, the other one has not.
func TestTwoPortsOfOneUnit(t *testing.T) {
	h, r := serveRules(t, nil)
	r.set(group(t), nil)
	own, grouped := h.login("vm1", me), h.login("disks", me) // the same ISID
	own.ready()
	grouped.until(0, [3]byte{})
	own.send(own.command(pdu.FlagFinal, 0, 0x16), nil)
	if res := own.finish(); res.status != 0 {
		t.Fatal(res)
	}
	if res := grouped.write(0, pattern(512, 1)); res.status != conflict {
		t.Errorf("a write by the other port: %v", res)
	}
	if res := own.write(0, pattern(512, 1)); res.status != 0 {
		t.Errorf("a write by who has reserved: %v", res)
	}
}
