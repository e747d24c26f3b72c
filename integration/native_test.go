package integration

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"sheepdog/integration/driver"
	"sheepdog/integration/rig"
)

// nativeModel drives one VDI over the native protocol, and says what must be in it.
type nativeModel struct {
	t       *testing.T
	rng     *rand.Rand
	sheep   func() *rig.Sheep // whose gateway is used next
	name    string
	disk    *driver.Disk
	content []byte
	snaps   map[string][]byte
	states  map[string][]byte
	clones  map[string][]byte
	made    int
	log     []string
}

const nativeShift = 20 // objects of 1 MiB: many of them for little data

func newNativeModel(t *testing.T, seed uint64, name string, sheep func() *rig.Sheep) *nativeModel {
	m := &nativeModel{
		t: t, rng: rand.New(rand.NewPCG(seed, 7)), sheep: sheep, name: name, content: make([]byte, 9<<20+512),
		snaps: map[string][]byte{}, states: map[string][]byte{}, clones: map[string][]byte{},
	}
	m.must(driver.Create(sheep().Native(), name, uint64(len(m.content)), nativeShift, 0))
	m.open()
	return m
}

func (m *nativeModel) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatalf("%s: %v, after\n%s", m.name, err, strings.Join(m.log[max(0, len(m.log)-40):], "\n"))
	}
}

func (m *nativeModel) note(format string, args ...any) {
	m.log = append(m.log, fmt.Sprintf(format, args...))
}

func (m *nativeModel) open() {
	m.t.Helper()
	cache := uint16(driver.FlagCache)
	if m.rng.IntN(2) == 0 {
		cache = driver.FlagDirect
	}
	var err error
	m.disk, err = driver.Open(m.sheep().Native(), m.name, "", cache)
	m.must(err)
	if m.disk.Size() != uint64(len(m.content)) { // through another gateway, too
		m.t.Fatalf("%s has %d bytes, want %d", m.name, m.disk.Size(), len(m.content))
	}
}

// close ends the client, as it should or not.
func (m *nativeModel) close() {
	if m.rng.IntN(2) == 0 {
		m.disk.Kill()
		return
	}
	m.must(m.disk.Close())
}

func (m *nativeModel) place() (off, n int) {
	off = m.rng.IntN(len(m.content)/512) * 512
	n = (1 + m.rng.IntN(1<<uint(m.rng.IntN(13)))) * 512
	return off, min(n, len(m.content)-off)
}

func (m *nativeModel) step() {
	switch k := m.rng.IntN(100); {
	case k < 45:
		off, n := m.place()
		p := rig.Random(m.rng.Uint64(), n)
		m.note("write %d at %d", n, off)
		m.must(m.disk.Write(p, uint64(off)))
		copy(m.content[off:], p)
	case k < 65:
		off, n := m.place()
		m.note("read %d at %d", n, off)
		got := make([]byte, n)
		m.must(m.disk.Read(got, uint64(off)))
		m.same(got, m.content[off:off+n], fmt.Sprintf("read at %d", off))
	case k < 70:
		m.note("flush")
		m.must(m.disk.Flush())
	case k < 75:
		i := m.rng.IntN(len(m.content) >> nativeShift)
		m.note("discard object %d", i)
		m.must(m.disk.Discard(uint64(i)<<nativeShift, 1<<nativeShift))
		clear(m.content[i<<nativeShift : (i+1)<<nativeShift])
	case k < 80:
		m.snapshot()
	case k < 83 && len(m.snaps) > 0:
		tag := m.anySnapshot()
		m.note("go to %s", tag)
		m.must(m.disk.Goto(tag))
		m.content = bytes.Clone(m.snaps[tag])
		state := make([]byte, len(m.states[tag]))
		m.must(m.disk.LoadState(state))
		m.same(state, m.states[tag], "state of "+tag)
	case k < 86 && len(m.snaps) > 0:
		m.deleteSnapshot()
	case k < 88:
		m.note("snapshot by dog")
		m.made++
		tag := fmt.Sprintf("d%d", m.made)
		m.sheep().Dog("vdi", "snapshot", m.name, "-s", tag)
		m.snaps[tag] = bytes.Clone(m.content)
	case k < 90 && len(m.content) < 14<<20:
		m.note("grow")
		m.content = append(m.content, make([]byte, 512*(1+m.rng.IntN(2000)))...)
		m.must(m.disk.Grow(uint64(len(m.content))))
	case k < 95:
		m.note("open again")
		m.close()
		m.open()
	case k < 97 && len(m.snaps) > 0:
		m.writeSnapshot()
	case len(m.snaps) > 0 && len(m.clones) < 8:
		m.clone()
	}
}

func (m *nativeModel) anySnapshot() string {
	var tags []string
	for tag := range m.snaps {
		tags = append(tags, tag)
	}
	slices.Sort(tags)
	return tags[m.rng.IntN(len(tags))]
}

func (m *nativeModel) snapshot() {
	m.made++
	tag := fmt.Sprintf("q%d", m.made)
	state := rig.Random(m.rng.Uint64(), m.rng.IntN(3<<20))
	m.note("snapshot %s with a state of %d", tag, len(state))
	m.must(m.disk.SaveState(state))
	m.must(m.disk.Snapshot(tag, uint64(len(state)), 42))
	m.snaps[tag], m.states[tag] = bytes.Clone(m.content), state
}

// clone makes a VDI of a snapshot, and writes to some of its objects. Its vid may be above or below those of what it comes from.
func (m *nativeModel) clone() {
	tag := m.anySnapshot()
	name := fmt.Sprintf("%d%s", m.rng.IntN(1000), m.name)
	if m.clones[name] != nil {
		return
	}
	m.note("clone %s as %s", tag, name)
	content := bytes.Clone(m.snaps[tag])
	m.must(driver.Clone(m.disk.Address, m.name, tag, name, uint64(len(content))))
	d, err := driver.Open(m.disk.Address, name, "", driver.FlagCache)
	m.must(err)
	for off := 0; off < len(content); off += 1 << (nativeShift + m.rng.IntN(2)) {
		p := rig.Random(m.rng.Uint64(), 512)
		m.must(d.Write(p, uint64(off)))
		copy(content[off:], p)
	}
	m.must(d.Close())
	m.clones[name] = content
}

// deleteSnapshot does as qemu-img does, which is a client of its own.
func (m *nativeModel) deleteSnapshot() {
	tag := m.anySnapshot()
	m.note("delete snapshot %s", tag)
	d, err := driver.Open(m.disk.Address, m.name, "", driver.FlagCache)
	m.must(err)
	m.must(d.ClearMap())
	m.must(driver.Delete(m.disk.Address, m.name, tag))
	m.must(d.Close())
	delete(m.snaps, tag)
	delete(m.states, tag)
}

// writeSnapshot opens a snapshot and writes: the VDI is then what that was.
func (m *nativeModel) writeSnapshot() {
	tag := m.anySnapshot()
	m.note("write to %s", tag)
	m.close()
	var err error
	m.disk, err = driver.Open(m.sheep().Native(), m.name, tag, driver.FlagDirect)
	m.must(err)
	m.content = bytes.Clone(m.snaps[tag])
	off, n := m.place()
	p := rig.Random(m.rng.Uint64(), n)
	m.must(m.disk.Write(p, uint64(off)))
	copy(m.content[off:], p)
}

func (m *nativeModel) same(got, want []byte, what string) {
	m.t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	i := 0
	for got[i] == want[i] {
		i++
	}
	m.must(fmt.Errorf("%s: byte %d of %d is %#x, want %#x", what, i, len(want), got[i], want[i]))
}

// verify compares everything there is, over the native protocol and over NBD.
func (m *nativeModel) verify() {
	m.t.Helper()
	m.note("verify")
	m.must(m.disk.Flush())
	got := make([]byte, len(m.content))
	m.must(m.disk.Read(got, 0))
	m.same(got, m.content, "over the connection that wrote")
	s := m.sheep()
	mustRead(m.t, s, m.name, 0, m.content)
	tags, states, err := m.disk.Snapshots()
	m.must(err)
	if len(tags) != len(m.snaps) {
		m.t.Fatalf("%s has snapshots %v, want %d", m.name, tags, len(m.snaps))
	}
	for name, content := range m.clones {
		mustRead(m.t, s, name, 0, content)
		d, err := driver.Open(s.Native(), name, "", driver.FlagCache)
		m.must(err)
		got := make([]byte, len(content))
		m.must(d.Read(got, 0))
		m.same(got, content, "clone "+name)
		m.must(d.Close())
	}
	for i, tag := range tags {
		if states[i] != uint64(len(m.states[tag])) {
			m.t.Fatalf("%s has a state of %d, want %d", tag, states[i], len(m.states[tag]))
		}
		mustRead(m.t, s, m.name+"@"+tag, 0, m.snaps[tag])
		d, err := driver.Open(s.Native(), m.name, tag, driver.FlagCache)
		m.must(err)
		got := make([]byte, len(m.snaps[tag]))
		m.must(d.Read(got, 0))
		m.same(got, m.snaps[tag], "snapshot "+tag)
		m.must(d.Close())
	}
}

// A client that does as QEMU does, through snapshots, rollbacks, states of machines, growing, killed clients
// and a sheep that is killed: what it reads is what was written, and NBD has the same.
func TestNativeModel(t *testing.T) {
	besideOthers(t)
	s := rig.Start(t, rig.Options{})
	m := newNativeModel(t, 1, "vm", func() *rig.Sheep { return s })
	for round := range 6 {
		for range 60 {
			m.step()
		}
		m.verify()
		if round%2 == 1 {
			m.note("kill the sheep")
			s.Kill()
			s.Start()
			m.verify()
		}
	}
	if m.disk.Close() != nil {
		t.Error("the VDI is not released")
	}
	rig.Contains(t, s.Dog("vdi", "check", "vm"), "as they should be")
}

// The sheep is killed while requests are under way: the client sends them again, and nothing is lost.
func TestNativeReconnect(t *testing.T) {
	besideOthers(t)
	s := rig.Start(t, rig.Options{})
	if err := driver.Create(s.Native(), "vm", 64<<20, 0, 0); err != nil {
		t.Fatal(err)
	}
	const workers, size = 8, 8 << 20
	d, err := driver.Open(s.Native(), "vm", "", driver.FlagDirect)
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	done := make(chan error, workers)
	content := make([][]byte, workers)
	for w := range workers {
		content[w] = make([]byte, size)
		go func() {
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			for {
				select {
				case <-stop:
					done <- nil
					return
				default:
				}
				off := rng.IntN(size/4096) * 4096
				p := rig.Random(rng.Uint64(), min(4096*(1+rng.IntN(20)), size-off))
				if err := d.Write(p, uint64(w*size+off)); err != nil {
					done <- err
					return
				}
				copy(content[w][off:], p)
			}
		}()
	}
	for range 3 {
		time.Sleep(500 * time.Millisecond)
		s.Kill()
		s.Start()
	}
	time.Sleep(300 * time.Millisecond)
	close(stop)
	for range workers {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	all := bytes.Join(content, nil)
	got := make([]byte, len(all))
	if err := d.Read(got, 0); err != nil || !bytes.Equal(got, all) {
		t.Errorf("other content than was written, %v", err)
	}
	mustRead(t, s, "vm", 0, all)
}

// "qemu-img snapshot -d" clears the map of the VDI, which may have one entry alone: then that looks like a
// discard. Both must do what is meant.
func TestNativeDeleteSnapshot(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	for name, objects := range map[string]int{"one": 1, "last": 3, "many": 129} {
		size := objects << nativeShift
		if err := driver.Create(s.Native(), name, uint64(size), nativeShift, 0); err != nil {
			t.Fatal(err)
		}
		d, err := driver.Open(s.Native(), name, "", driver.FlagCache)
		if err != nil {
			t.Fatal(err)
		}
		content := make([]byte, size)
		for i := range objects {
			if name != "last" || i == objects-1 {
				copy(content[i<<nativeShift:], rig.Random(uint64(i), 4096))
				if err := d.Write(content[i<<nativeShift:][:4096], uint64(i<<nativeShift)); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := d.Snapshot("s", 0, 0); err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		other, err := driver.Open(s.Native(), name, "", driver.FlagCache)
		if err == nil {
			err = other.Read(make([]byte, 512), 0) // what format is it?
		}
		if err == nil {
			err = other.ClearMap()
		}
		if err == nil {
			err = driver.Delete(s.Native(), name, "s")
		}
		if err == nil {
			err = other.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		mustRead(t, s, name, 0, content)
		// A discard as the first request on the connection of data, by a client that comes after.
		if d, err = driver.Open(s.Native(), name, "", driver.FlagDirect); err == nil {
			err = d.Discard(uint64(size-1<<nativeShift), 1<<nativeShift)
		}
		if err != nil {
			t.Fatal(err)
		}
		clear(content[size-1<<nativeShift:])
		mustRead(t, s, name, 0, content)
		d.Kill()
	}
}

// The same against three nodes: each client through whatever gateway, a node killed and another one drained of its clients in between.
func TestNativeCluster(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlock(t, 3, 3)
	var at int
	m := newNativeModel(t, 2, "vm", func() *rig.Sheep { return f.Nodes[at] })
	for round := range 4 {
		for range 25 {
			m.step()
			if m.rng.IntN(8) == 0 { // handed over to another gateway, one after the other
				m.must(m.disk.Flush())
				m.close()
				at = m.rng.IntN(len(f.Nodes))
				m.note("through node %d", at+1)
				m.open()
			}
		}
		m.verify()
		switch round {
		case 0: // a node that is not the gateway
			dead := (at + 1) % len(f.Nodes)
			m.note("kill node %d", dead+1)
			f.Nodes[dead].Kill()
			for range 10 {
				off, n := m.place()
				p := rig.Random(m.rng.Uint64(), n)
				m.must(m.disk.Write(p, uint64(off)))
				copy(m.content[off:], p)
			}
			f.Nodes[dead].Start()
		case 1: // the gateway itself: the client waits for it
			m.note("kill the gateway, node %d", at+1)
			f.Nodes[at].Kill()
			f.Nodes[at].Start()
			off, n := m.place()
			p := rig.Random(m.rng.Uint64(), n)
			m.must(m.disk.Write(p, uint64(off)))
			copy(m.content[off:], p)
		}
		f.WaitWhole(wholeLimit)
	}
	m.verify()
}

// A client takes a snapshot with the state of its machine, and grows, while it does not know that another snapshot was taken meanwhile:
// it has written nothing since, and names the old vid. What it means is the VDI. But a state in the midst of which the
// snapshot was taken is refused: it would be in neither.
func TestNativeUnaware(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	const size = 8 << nativeShift
	if err := driver.Create(s.Native(), "vm", size, nativeShift, 0); err != nil {
		t.Fatal(err)
	}
	d, err := driver.Open(s.Native(), "vm", "", driver.FlagDirect)
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	content := rig.Random(1, size)
	must(d.Write(content, 0))
	state := rig.Random(2, 3<<nativeShift-1000)
	s.Dog("vdi", "snapshot", "vm", "-s", "d1")
	s.Dog("vdi", "snapshot", "vm", "-s", "d2")
	must(d.SaveState(state))
	must(d.Snapshot("q1", uint64(len(state)), 7))
	if d.Reloads != 0 {
		t.Error("it was told of the snapshots: nothing is seen of what this is about")
	}
	s.Dog("vdi", "snapshot", "vm", "-s", "d3")
	must(d.Grow(size + 4096))
	content = append(content, make([]byte, 4096)...)
	copy(content[512:], "more")
	must(d.Write(content[:1024], 0))
	mustRead(t, s, "vm", 0, content)

	for at, part := range map[string]int{"within an object": 1<<nativeShift + 96<<10, "between objects": 2 << nativeShift, "at the end": len(state)} {
		must(d.SaveState(state[:part]))
		tag := strings.ReplaceAll(at, " ", "-")
		s.Dog("vdi", "snapshot", "vm", "-s", tag)
		err := d.SaveStateFrom(part, state)
		if err == nil {
			err = d.Snapshot("never", uint64(len(state)), 7)
		}
		if !errors.Is(err, driver.Result(driver.ReadOnly)) {
			t.Errorf("a state cut in two %s: %v", at, err)
		}
		must(d.Write(content[:512], 0)) // so it learns
	}
	must(d.SaveState(state))
	must(d.Snapshot("q2", uint64(len(state)), 8))
	for _, to := range []string{"q1", "q2"} {
		must(d.Goto(to))
		got := make([]byte, len(state))
		must(d.LoadState(got))
		if !bytes.Equal(got, state) {
			t.Errorf("%s has another state", to)
		}
	}
	mustRead(t, s, "vm", 0, content)
	tags, _, err := d.Snapshots()
	must(err)
	if len(tags) != 8 {
		t.Errorf("snapshots are %v", tags)
	}
	rig.Contains(t, s.Dog("vdi", "check", "vm"), "as they should be")
}

// A client has a VDI open, idle, while that is deleted and made anew by others, and its sheep is started anew, or it fails over to another node: nobody
// there knows what it had opened. What it writes goes nowhere, and it may neither take a snapshot of the new one nor go back from it.
func TestNativeMadeAnew(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlock(t, 3, 3)
	here, others, elsewhere := f.Nodes[0], f.Nodes[1], f.Nodes[2]
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	const size = 4 << nativeShift
	made := func(seed uint64) []byte {
		content := rig.Random(seed, size)
		must(driver.Create(others.Native(), "vm", size, nativeShift, 0))
		d, err := driver.Open(others.Native(), "vm", "", driver.FlagDirect)
		must(err)
		must(d.Write(content, 0))
		must(d.Close())
		f.Know("vm")
		return content
	}
	made(0)
	for n, away := range []struct {
		what string
		do   func(*driver.Disk)
	}{
		{"the sheep is started anew", func(*driver.Disk) {
			here.Kill()
			here.Start()
			f.WaitWhole(time.Minute)
		}},
		{"another node takes over", func(d *driver.Disk) {
			here.Kill()
			d.Address = elsewhere.Native()
		}},
	} {
		idle, err := driver.Open(here.Native(), "vm", "", driver.FlagDirect)
		must(err)
		must(idle.Write(make([]byte, 512), 0))
		must(driver.Delete(others.Native(), "vm", ""))
		eventually(t, time.Minute, "it is collected", func() error {
			if n := others.Metric("sheepdog_gc_pending"); n > 0 {
				return fmt.Errorf("%v are pending", n)
			}
			return nil
		})
		content := made(uint64(n) + 1)
		away.do(idle)
		for _, off := range []uint64{0, size / 2} {
			if err := idle.Write(make([]byte, 4096), off); !errors.Is(err, driver.Result(driver.NoVDI)) {
				t.Errorf("%s: a write of who had the old one open: %v", away.what, err)
			}
		}
		if err := idle.Read(make([]byte, 4096), 0); err == nil {
			t.Errorf("%s: the old one is read", away.what)
		}
		if err := idle.Discard(0, 1<<nativeShift); !errors.Is(err, driver.Result(driver.NoVDI)) {
			t.Errorf("%s: a discard: %v", away.what, err)
		}
		if err := idle.Snapshot("s", 0, 0); err == nil {
			t.Errorf("%s: a snapshot is taken", away.what)
		}
		mustRead(t, others, "vm", 0, content)
		now, err := driver.Open(elsewhere.Native(), "vm", "", driver.FlagDirect)
		must(err)
		if tags, _, err := now.Snapshots(); err != nil || len(tags) > 0 {
			t.Errorf("%s: snapshots %v: %v", away.what, tags, err)
		}
		must(now.Snapshot("one", 0, 0))
		if tags, _, err := now.Snapshots(); err != nil || len(tags) != 1 {
			t.Errorf("%s: snapshots %v, want one: %v", away.what, tags, err)
		}
		must(now.Close())
		must(driver.Delete(elsewhere.Native(), "vm", "one"))
		idle.Kill()
	}
}

// A client has a snapshot open that others delete, and writes, which makes the VDI anew of it: that is refused, and the VDI stays.
func TestNativeDeletedBase(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	const size = 2 << nativeShift
	content := rig.Random(1, size)
	err := driver.Create(s.Native(), "vm", size, nativeShift, 0)
	var d *driver.Disk
	if err == nil {
		d, err = driver.Open(s.Native(), "vm", "", driver.FlagDirect)
	}
	if err == nil {
		err = d.Write(content, 0)
	}
	if err == nil {
		err = d.Snapshot("one", 0, 0)
	}
	if err == nil {
		err = d.Close()
	}
	if err == nil {
		d, err = driver.Open(s.Native(), "vm", "one", driver.FlagDirect)
	}
	if err == nil {
		err = driver.Delete(s.Native(), "vm", "one")
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Write(make([]byte, 4096), 0); !errors.Is(err, driver.Result(driver.NoBaseVDI)) {
		t.Errorf("a write to a snapshot that is deleted: %v", err)
	}
	mustRead(t, s, "vm", 0, content)
	d.Kill()
}

// One volume through native clients, NBD and iSCSI, each at a gateway of its own, all connected all the time: who writes takes it over, and
// everybody reads what is newest. Then clones of its snapshots, with their copies.
func TestNativeHandOver(t *testing.T) {
	besideOthers(t)
	rig.Need(t, "qemu-io")
	f := rig.NewFlock(t, 3, 3)
	const size = 8 << nativeShift
	a, b, c := f.Nodes[0], f.Nodes[1], f.Nodes[2]
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(driver.Create(a.Native(), "vm", size, nativeShift, 2))
	f.Know("vm")
	d, err := driver.Open(a.Native(), "vm", "", driver.FlagDirect)
	must(err)
	content := rig.Random(1, size)
	must(d.Write(content, 0)) // its copy of the map has no holes from now on: those it would not ask about
	nbd := b.Dial("vm")
	defer nbd.Close()
	got := make([]byte, size)
	rng := rand.New(rand.NewPCG(3, 3))
	for round := range 6 {
		place := func() (off int, p []byte) {
			n := 512 * (1 + rng.IntN(500))
			off = 512 * rng.IntN((size-n)/512)
			p = rig.Random(rng.Uint64(), n)
			copy(content[off:], p)
			return off, p
		}
		off, p := place()
		must(d.Write(p, uint64(off)))
		off, p = place()
		must(nbd.Write(p, uint64(off), 0))
		off = rng.IntN(size/4096) * 4096
		pattern := byte(round + 1)
		qemuIO(t, c.ISCSI("vm"), fmt.Sprintf("write -P %d %d 4k", pattern, off))
		copy(content[off:], bytes.Repeat([]byte{pattern}, 4096))

		must(d.Read(got, 0))
		if !bytes.Equal(got, content) {
			t.Fatalf("round %d: other content over the native protocol", round)
		}
		must(nbd.Read(got, 0))
		if !bytes.Equal(got, content) {
			t.Fatalf("round %d: other content over NBD", round)
		}
		mustRead(t, c, "vm", 0, content)
		if round == 2 {
			b.Dog("vdi", "snapshot", "vm", "-s", "one")
		}
	}
	if d.Reloads != 1 {
		t.Errorf("it was told of %d snapshots, want 1", d.Reloads)
	}
	must(driver.Clone(c.Native(), "vm", "one", "clone", 0))
	e, err := driver.Open(c.Native(), "clone", "", driver.FlagCache)
	must(err)
	must(e.Write(content[:4096], 1<<nativeShift))
	must(e.Flush())
	want := make([]byte, size)
	s := c.Dial("vm@one")
	must(s.Read(want, 0))
	s.Close()
	copy(want[1<<nativeShift:], content[:4096])
	must(e.Read(got, 0))
	if !bytes.Equal(got, want) {
		t.Error("the clone has other content")
	}
	must(e.Close())
	for _, name := range []string{"vm", "clone"} {
		var list []struct {
			Name   string
			Copies int
		}
		a.DogJSON(&list, "vdi", "list")
		i := slices.IndexFunc(list, func(v struct {
			Name   string
			Copies int
		}) bool {
			return v.Name == name
		})
		if i < 0 || list[i].Copies != 2 {
			t.Errorf("%s is not there with two copies: %v", name, list)
		}
		rig.Contains(t, a.Dog("vdi", "check", name), "as they should be")
	}
	d.Kill() // who is killed keeps nobody from the volume
	nbd.Close()
	for deadline := time.Now().Add(10 * time.Second * patience()); ; time.Sleep(50 * time.Millisecond) {
		r := a.DogRun("vdi", "delete", "vm")
		if r.Code == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the volume of a killed client is not deleted: %s", r.Stderr)
		}
	}
}

// A machine is migrated to another process, with another gateway, which opens the VDI while the one before has it, and has perhaps written nothing
// yet: what that makes until it ends is there, be it where nothing was or in place of what a snapshot has.
func TestNativeMigration(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlock(t, 3, 3)
	const size = 8 << nativeShift
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(driver.Create(f.Nodes[0].Native(), "vm", size, nativeShift, 0))
	f.Know("vm")
	content := make([]byte, size)
	d, err := driver.Open(f.Nodes[0].Native(), "vm", "", driver.FlagDirect)
	must(err)
	write := func(object, off int) {
		t.Helper()
		p := rig.Random(uint64(off), 4096)
		must(d.Write(p, uint64(object<<nativeShift+off)))
		copy(content[object<<nativeShift+off:], p)
	}
	same := func(what string) {
		t.Helper()
		got := make([]byte, size)
		must(d.Read(got, 0))
		for i := range size >> nativeShift {
			if part := got[i<<nativeShift:][:1<<nativeShift]; !bytes.Equal(part, content[i<<nativeShift:][:1<<nativeShift]) {
				t.Errorf("%s: object %d is not what was written", what, i)
			}
		}
	}
	write(0, 0)
	write(1, 0)
	for round, from := range []int{0, 1, 2, 2} {
		to := []int{1, 2, 2, 0}[round] // through the same gateway, too
		f.Nodes[from].Dog("vdi", "snapshot", "vm", "-s", fmt.Sprint("before", round))
		if round == 3 { // nobody knows any more who has it open, but that a client is there
			f.Nodes[from].Kill()
			f.Nodes[from].Start()
			write(7, 0)
		}
		next, err := driver.Open(f.Nodes[to].Native(), "vm", "", driver.FlagDirect)
		must(err)
		write(0, 4096*(round+1))
		write(2+round, 8192*round)
		must(d.Close())
		d = next
		same(fmt.Sprintf("from node %d to node %d", from+1, to+1))
		write(6, 4096*round)
		f.Nodes[from].Dog("vdi", "snapshot", "vm", "-s", fmt.Sprint("behind", round))
		write(6, 4096*round+512)
		write(1, 4096*round+512)
		same("behind a snapshot")
	}
	must(d.Close())
	mustRead(t, f.Nodes[1], "vm", 0, content)
	// Nobody has it open: who opens it is told what there is.
	d, err = driver.Open(f.Nodes[2].Native(), "vm", "", driver.FlagDirect)
	must(err)
	must(d.Discard(4<<nativeShift, 1<<nativeShift))
	must(d.Close())
	d, err = driver.Open(f.Nodes[1].Native(), "vm", "", driver.FlagDirect)
	must(err)
	if d.Entry(4) != 0 || d.Entry(1) == 0 {
		t.Errorf("entries of who is alone are %x, want a hole at 4 alone", [8]uint32{d.Entry(0), d.Entry(1), d.Entry(2), d.Entry(3), d.Entry(4), d.Entry(5), d.Entry(6), d.Entry(7)})
	}
	must(d.Close())
	rig.Contains(t, f.Nodes[0].Dog("vdi", "check", "vm"), "as they should be")
}
