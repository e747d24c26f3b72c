package rig

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Guest is a real Linux in a virtual machine without hardware support, made of Debian's packages: for function, not for speed.
// The machine's loopback can be reached from it. See integration/guest.
type Guest struct {
	t       testing.TB
	dir     string
	scripts string // where the scripts of integration/guest are
}

// building is held by who builds the guest: its directory is everybody's.
var building sync.Mutex

// NewGuest builds the guest, if it was not built yet.
func NewGuest(t testing.TB) *Guest {
	t.Helper()
	Need(t, "qemu-system-x86_64", "cpio", "nbd-client", "depmod", "fio")
	_, file, _, _ := runtime.Caller(0)
	g := &Guest{t: t, scripts: filepath.Join(filepath.Dir(filepath.Dir(file)), "guest")}
	g.dir = filepath.Join(filepath.Dir(filepath.Dir(g.scripts)), ".cache", "guest")
	building.Lock()
	defer building.Unlock()
	if r := Run(t, 5*time.Minute, "", filepath.Join(g.scripts, "build.sh"), g.dir); r.Code != 0 {
		t.Fatalf("build the guest: status %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	return g
}

// Hooks are what a script in the guest has the test do, by name: "host NAME ARG…" calls it, and shows what it
// returns. They run on the test's goroutine, one at a time.
type Hooks map[string]func(args []string) string

// hookCall is a call of a hook that waits to be carried out.
type hookCall struct {
	name   string
	args   []string
	result chan string
}

// Run boots the guest, runs the script in it, and returns what it wrote. The script must end with status 0 within the limit.
func (g *Guest) Run(limit time.Duration, hooks Hooks, script string, qemu ...string) string {
	g.t.Helper()
	m := g.Start(hooks, script, qemu...)
	return m.Wait(limit)
}

// Machine is a guest that runs.
type Machine struct {
	t       testing.TB
	guest   *Guest
	script  string // its path
	socket  string // QEMU's monitor
	monitor *monitor
	stdin   io.Writer // its console
	hooks   Hooks
	calls   chan hookCall
	ended   chan error
	console *console
	cmd     *exec.Cmd
}

// console is what a guest wrote so far.
type console struct {
	mu   sync.Mutex
	text strings.Builder
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.String()
}

// Start boots the guest; Wait must be called.
func (g *Guest) Start(hooks Hooks, script string, qemu ...string) *Machine {
	g.t.Helper()
	calls := make(chan hookCall)
	l, err := net.Listen("tcp", Address+":0")
	if err != nil {
		g.t.Fatal(err)
	}
	server := &http.Server{Handler: callHandler(calls)}
	go server.Serve(l)
	g.t.Cleanup(func() { server.Close() })
	head := fmt.Sprintf("HOST_PORT=%d\n. /lib.sh\nset -ex\n", l.Addr().(*net.TCPAddr).Port)
	return g.start(hooks, calls, File(g.t, "test.sh", []byte(head+script)), qemu...)
}

// start starts a process of QEMU.
func (g *Guest) start(hooks Hooks, calls chan hookCall, script string, qemu ...string) *Machine {
	g.t.Helper()
	m := &Machine{t: g.t, guest: g, script: script, hooks: hooks, calls: calls, ended: make(chan error, 1), console: new(console), socket: socketPath(g.t, "qmp")}
	args := append([]string{g.dir, script, "-qmp", "unix:" + m.socket + ",server=on,wait=off"}, qemu...)
	m.cmd = exec.Command(filepath.Join(g.scripts, "run.sh"), args...)
	m.cmd.Env = append(os.Environ(), "TMPDIR="+g.t.TempDir())
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	out, err := m.cmd.StdoutPipe()
	if err == nil {
		m.cmd.Stderr = m.cmd.Stdout
		m.stdin, err = m.cmd.StdinPipe()
	}
	if err == nil {
		err = m.cmd.Start()
	}
	if err != nil {
		g.t.Fatalf("start the guest: %v", err)
	}
	g.t.Cleanup(func() { syscall.Kill(-m.cmd.Process.Pid, syscall.SIGKILL) })
	go func() {
		lines := bufio.NewScanner(out)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			m.console.mu.Lock()
			m.console.text.WriteString(lines.Text() + "\n")
			m.console.mu.Unlock()
		}
		m.ended <- errors.Join(lines.Err(), m.cmd.Wait())
	}()
	return m
}

// callHandler takes calls of hooks from guests.
type callHandler chan hookCall

func (h callHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	words := strings.Split(strings.TrimPrefix(r.URL.Path, "/"), "/")
	c := hookCall{name: words[0], args: words[1:], result: make(chan string, 1)}
	ctx, cancel := context.WithTimeout(r.Context(), WholeLimit+time.Minute)
	defer cancel()
	select {
	case h <- c:
	case <-ctx.Done():
		return
	}
	select {
	case text := <-c.result:
		fmt.Fprint(w, text)
	case <-ctx.Done():
	}
}

// Wait carries out hooks until the guest ends, and returns what it wrote.
func (m *Machine) Wait(limit time.Duration) string {
	m.t.Helper()
	until := time.After(limit)
	for {
		select {
		case c := <-m.calls:
			m.carryOut(c)
		case err := <-m.ended:
			if err != nil {
				m.t.Fatalf("guest: %v\n%s", err, m.console)
			}
			return m.console.String()
		case <-until:
			m.t.Fatalf("the guest was not done in %v\n%s", limit, m.console)
		}
	}
}

// carryOut carries a call of a hook out.
func (m *Machine) carryOut(c hookCall) {
	m.t.Helper()
	hook := m.hooks[c.name]
	if hook == nil {
		m.t.Fatalf("the guest asked for %q, which there is not\n%s", c.name, m.console)
	}
	c.result <- hook(c.args)
}
