package integration

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// loggedIn logs in to a target over a new connection.
func loggedIn(address, target string, isid uint16) (net.Conn, error) {
	c, err := net.DialTimeout("tcp", address, 10*time.Second)
	if err != nil {
		return nil, err
	}
	text := "InitiatorName=iqn.2001-01.test:soak\x00SessionType=Normal\x00TargetName=" + target + "\x00"
	b := make([]byte, 48)
	b[0], b[1], b[8] = 0x43, 0x87, 0x80 // login, from the operational stage to the end; a random ISID
	b[7] = byte(len(text))
	binary.BigEndian.PutUint16(b[12:], isid)
	b = append(b, text...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	c.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err = c.Write(b); err == nil {
		_, err = io.ReadFull(c, b[:48])
	}
	if err == nil && (b[0] != 0x23 || b[36] != 0 || b[37] != 0) {
		err = fmt.Errorf("login: status %x", b[36:38])
	}
	if err == nil {
		_, err = io.ReadFull(c, make([]byte, (int(b[7])+int(b[6])<<8+3)&^3))
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// held is what a daemon holds: descriptors and goroutines.
func held(t *testing.T, s *rig.Sheep) (descriptors, goroutines int) {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.PID()))
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.Get("http://" + s.Admin() + "/debug/pprof/goroutine?debug=1")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`total (\d+)`).FindSubmatch(b)
	if m == nil {
		t.Fatalf("no count of goroutines: %.100s", b)
	}
	n, _ := strconv.Atoi(string(m[1]))
	return len(list), n
}

// Logins one after another, ended by either side in turn, leave no session, descriptor or goroutine behind. As a
// soak they are 70 000: gotgt's session handles were used up by 65 535.
func TestISCSIConnects(t *testing.T) {
	n := 3000
	if soaking() {
		n = 70_000
	}
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm1", "8M")
	address := net.JoinHostPort(s.Host(), strconv.Itoa(s.ISCSIPort))
	target := rig.IQN + ":vm1"
	settled := func() (int, int) {
		var fds, routines int
		waitUntil(t, 20*time.Second, func() bool {
			fds, routines = held(t, s)
			time.Sleep(200 * time.Millisecond)
			again, more := held(t, s)
			return fds == again && routines == more && !strings.Contains(s.Dog("session", "list"), "iscsi")
		})
		return fds, routines
	}
	once := func(i int) {
		c, err := loggedIn(address, target, uint16(i))
		if err != nil {
			t.Fatalf("login %d: %v", i, err)
		}
		if i%2 == 0 { // log out: the target closes
			b := make([]byte, 48)
			b[0], b[1], b[19] = 0x46, 0x80, 1
			c.Write(b)
			io.Copy(io.Discard, c)
		}
		c.Close()
	}
	for i := range 50 {
		once(i)
	}
	fds, routines := settled()
	began := time.Now()
	for i := range n {
		once(i)
	}
	t.Logf("%d logins in %v", n, time.Since(began).Round(time.Millisecond))
	nowFDs, nowRoutines := settled()
	if nowFDs > fds+3 || nowRoutines > routines+5 {
		t.Errorf("%d descriptors and %d goroutines, before %d and %d", nowFDs, nowRoutines, fds, routines)
	}
}

// The suite's tests with two paths, through two gateways: what is done on one counts on the other.
func TestISCSITwoGateways(t *testing.T) {
	besideOthers(t)
	rig.Need(t, "iscsi-test-cu")
	f := rig.NewFlock(t, 3, 2)
	f.Nodes[0].Dog("vdi", "create", "vm1", "64M")
	f.Know("vm1")
	for _, name := range []string{"MultipathIO", "Reserve6", "ProutReserve", "ProutPreempt", "ProutClear"} {
		results, output := suite(t, "ALL."+name+".*", f.Nodes[0].ISCSI("vm1"), f.Nodes[1].ISCSI("vm1"))
		if len(results) < 1 {
			t.Errorf("%d tests were run", len(results))
		}
		judge(t, results, output, nil, nil)
	}
}
