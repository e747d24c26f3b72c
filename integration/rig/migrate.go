package rig

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Await carries out hooks until the guest has written a text.
func (m *Machine) Await(limit time.Duration, text string) {
	m.t.Helper()
	for until := time.Now().Add(limit); !strings.Contains(m.console.String(), text); {
		if time.Now().After(until) {
			m.t.Fatalf("the guest did not write %q in %v\n%s", text, limit, m.console)
		}
		select {
		case c := <-m.calls:
			m.carryOut(c)
		case err := <-m.ended:
			m.t.Fatalf("guest: %v\n%s", err, m.console)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Tell writes a line to the guest's console.
func (m *Machine) Tell(line string) {
	m.t.Helper()
	if _, err := fmt.Fprintln(m.stdin, line); err != nil {
		m.t.Fatalf("write to the guest's console: %v", err)
	}
}

// Migrate moves the running guest to a new process of QEMU, which has its drives by the given arguments, and returns that.
// The first process still has its drives open, paused, until the other one runs.
func (m *Machine) Migrate(limit time.Duration, qemu ...string) *Machine {
	m.t.Helper()
	next := m.guest.start(m.hooks, m.calls, m.script, append(qemu, "-incoming", "defer")...)
	next.console.text.WriteString(m.console.String())
	from, to := m.qmp(), next.qmp()
	to.do("migrate-incoming", map[string]any{"uri": "tcp:" + Address + ":0"}, nil)
	var incoming struct {
		Addresses []struct{ Port string } `json:"socket-address"`
	}
	to.do("query-migrate", nil, &incoming)
	if len(incoming.Addresses) == 0 {
		m.t.Fatal("QEMU does not say where it can be migrated to")
	}
	from.do("migrate-set-parameters", map[string]any{"max-bandwidth": 1 << 30, "downtime-limit": 500}, nil)
	from.do("migrate", map[string]any{"uri": "tcp:" + Address + ":" + incoming.Addresses[0].Port}, nil)
	for until := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		var s struct{ Status string }
		from.do("query-migrate", nil, &s)
		if s.Status == "completed" {
			break
		}
		if s.Status == "failed" || time.Now().After(until) {
			m.t.Fatalf("migration: %q\n%s\n%s", s.Status, m.console, next.console)
		}
	}
	for until := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		var s struct{ Running bool }
		to.do("query-status", nil, &s)
		if s.Running {
			break
		}
		if time.Now().After(until) {
			m.t.Fatalf("the guest does not run after the migration\n%s", next.console)
		}
	}
	from.do("quit", nil, nil)
	<-m.ended
	return next
}

// monitor speaks to a QEMU by its machine protocol.
type monitor struct {
	t   testing.TB
	dec *json.Decoder
	enc *json.Encoder
}

func (m *Machine) qmp() *monitor {
	m.t.Helper()
	if m.monitor != nil {
		return m.monitor
	}
	var conn net.Conn
	var err error
	for until := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if conn, err = net.Dial("unix", m.socket); err == nil {
			break
		}
		if time.Now().After(until) {
			m.t.Fatalf("QEMU does not listen: %v\n%s", err, m.console)
		}
	}
	m.t.Cleanup(func() { conn.Close() })
	m.monitor = &monitor{m.t, json.NewDecoder(conn), json.NewEncoder(conn)}
	m.monitor.do("qmp_capabilities", nil, nil)
	return m.monitor
}

// do has QEMU carry a command out, and decodes what it returns.
func (q *monitor) do(command string, args map[string]any, result any) {
	q.t.Helper()
	request := map[string]any{"execute": command}
	if args != nil {
		request["arguments"] = args
	}
	if err := q.enc.Encode(request); err != nil {
		q.t.Fatalf("QEMU, %s: %v", command, err)
	}
	for {
		var reply struct{ Return, Error json.RawMessage }
		if err := q.dec.Decode(&reply); err != nil {
			q.t.Fatalf("QEMU, %s: %v", command, err)
		}
		switch {
		case reply.Error != nil:
			q.t.Fatalf("QEMU, %s: %s", command, reply.Error)
		case reply.Return == nil: // the greeting, or an event
		case result == nil:
			return
		default:
			if err := json.Unmarshal(reply.Return, result); err != nil {
				q.t.Fatalf("QEMU, %s: %v in %s", command, err, reply.Return)
			}
			return
		}
	}
}

// socketPath is a path short enough for a socket.
func socketPath(t testing.TB, name string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sheep-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, name)
}
