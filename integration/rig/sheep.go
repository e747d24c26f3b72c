package rig

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"sheepdog/integration/client"
)

// startLimit bounds how long a daemon may take until it answers; endLimit how long it may take to stop.
const (
	startLimit = time.Minute
	endLimit   = time.Minute
)

// Options of a daemon under test. The zero value is one disk in a directory of the test's own.
type Options struct {
	Disks  []string // directories of the disks; default: one below the test's directory
	Config string   // further configuration, YAML lines at top level (not node, listen or cluster)
	// Address is where it listens, with the usual ports; "": FreeAddress.
	Address string
	NBD     string   // further lines of the nbd section, each indented by two spaces
	Env     []string // further environment
	// Raw daemons are started without being formatted.
	Raw bool
}

// Sheep is one daemon. It is ended with the test.
type Sheep struct {
	Disks      []string
	NBDPort    int
	NativePort int
	AdminPort  int
	ISCSIPort  int
	Unix       string // path of its NBD socket
	NativeUnix string // path of its socket for the native protocol

	t       testing.TB
	address string // where it listens
	within  string // its network namespace; "": that of the tests
	config  string
	env     []string
	logPath string
	cmd     *exec.Cmd
	exited  chan struct{}
}

// Address is where others than daemons listen, and daemons in a network of their own for those inside.
const Address = "127.0.0.1"

// The usual ports of a daemon.
const (
	nativePort = 7000
	adminPort  = 7003
	iscsiPort  = 3260
	nbdPort    = 10809
)

// Start starts a formatted cluster of one daemon (one copy) and waits until it is ready.
func Start(t testing.TB, o Options) *Sheep {
	t.Helper()
	s := New(t, o)
	s.Start()
	if !o.Raw {
		s.Dog("cluster", "format", "-c", "1")
	}
	return s
}

// New prepares a daemon without starting it.
func New(t testing.TB, o Options) *Sheep {
	t.Helper()
	dir := t.TempDir()
	s := &Sheep{t: t, Disks: o.Disks, env: o.Env, config: filepath.Join(dir, "sheep.yaml"), logPath: filepath.Join(dir, "sheep.log")}
	if s.Disks == nil {
		s.Disks = []string{filepath.Join(dir, "disk")}
		if err := os.Mkdir(s.Disks[0], 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// A socket's path is at most 107 bytes long, a test's directory can be longer.
	sockets, err := os.MkdirTemp("", "sheep-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(sockets) })
	s.Unix, s.NativeUnix = filepath.Join(sockets, "nbd.sock"), filepath.Join(sockets, "native.sock")
	if s.address = o.Address; s.address == "" {
		s.address = FreeAddress(t)
	}
	s.NBDPort, s.AdminPort, s.NativePort, s.ISCSIPort = nbdPort, adminPort, nativePort, iscsiPort
	text := fmt.Sprintf(`node:
  name: n1
  address: %s
  disks: [%s]
native:
  unix: %s
nbd:
  unix: %s
%slog:
  level: debug
%s`, s.address, strings.Join(s.Disks, ", "), s.NativeUnix, s.Unix, o.NBD, o.Config)
	if err := os.WriteFile(s.config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.cleanup)
	return s
}

// Launch starts the daemon's process without waiting for it to be ready.
func (s *Sheep) Launch() {
	s.t.Helper()
	log, err := os.OpenFile(s.logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	program, args := s.inside(filepath.Join(bin(s.t), "sheep"), "--config", s.config)
	s.cmd = exec.Command(program, args...)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	s.cmd.Env = append(os.Environ(), s.env...)
	// The kernel ends the daemon if the test process dies before it could clean up.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatalf("start sheep: %v", err)
	}
	s.exited = make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) {
		cmd.Wait()
		close(exited)
	}(s.cmd, s.exited)
}

// inside is a command as it is run where the daemon is.
func (s *Sheep) inside(program string, args ...string) (string, []string) {
	if s.within == "" {
		return program, args
	}
	return Tool("ip"), append([]string{"netns", "exec", s.within, program}, args...)
}

// Start starts the daemon and waits until its admin and NBD ports answer. It returns how long that took.
func (s *Sheep) Start() time.Duration {
	s.t.Helper()
	began := time.Now()
	s.Launch()
	if err := s.waitReady(); err != nil {
		s.t.Fatalf("sheep did not become ready: %v\n%s", err, s.Log())
	}
	return time.Since(began)
}

func (s *Sheep) waitReady() error {
	deadline := time.Now().Add(startLimit)
	var last error
	for time.Now().Before(deadline) {
		select {
		case <-s.exited:
			return fmt.Errorf("it ended: %v", s.cmd.ProcessState)
		default:
		}
		if _, last = s.fetch("/healthz", 2*time.Second); last == nil {
			var conn net.Conn
			if conn, last = net.DialTimeout(s.nbdNetwork(), s.nbdAddress(), time.Second); last == nil {
				return conn.Close()
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
	return fmt.Errorf("no answer in %v: %w", startLimit, last)
}

// nbdNetwork and nbdAddress are where NBD can be reached from everywhere.
func (s *Sheep) nbdNetwork() string {
	if s.within != "" {
		return "unix"
	}
	return "tcp"
}

func (s *Sheep) nbdAddress() string {
	if s.within != "" {
		return s.Unix
	}
	return s.NBD()
}

// fetch gets a page of the daemon, within a limit. What is asked again and again is asked so: to start dog each time would take more
// of the processors than the daemons do.
func (s *Sheep) fetch(path string, limit time.Duration) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.Admin()+path, nil)
	if err != nil {
		return "", err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: s.dial}}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %s", req.URL, resp.Status)
	}
	text, err := io.ReadAll(resp.Body)
	return string(text), err
}

// dial connects to an address where the daemon is.
func (s *Sheep) dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	var d net.Dialer
	if s.within == "" {
		return d.DialContext(ctx, network, address)
	}
	if entry := inside(s.within, func() { conn, err = d.DialContext(ctx, network, address) }); entry != nil {
		return nil, entry
	}
	return conn, err
}

// Kill ends the daemon as a crash would: SIGKILL, no goodbye.
func (s *Sheep) Kill() {
	s.t.Helper()
	s.cmd.Process.Kill()
	<-s.exited
}

// Stop asks the daemon to stop and checks that it does so cleanly.
func (s *Sheep) Stop() {
	s.t.Helper()
	s.cmd.Process.Signal(syscall.SIGTERM)
	if code := s.Wait(endLimit); code != 0 {
		s.t.Errorf("sheep ended with status %d after SIGTERM\n%s", code, s.Log())
	}
}

// Wait waits for the daemon to end by itself and returns its exit status, -1 for a signal.
func (s *Sheep) Wait(limit time.Duration) int {
	s.t.Helper()
	select {
	case <-s.exited:
	case <-time.After(limit):
		s.cmd.Process.Signal(syscall.SIGQUIT) // the log gets its goroutines
		select {
		case <-s.exited:
		case <-time.After(5 * time.Second):
		}
		s.Kill()
		s.t.Fatalf("sheep did not end in %v\n%s", limit, s.Log())
	}
	return s.cmd.ProcessState.ExitCode()
}

// Running reports whether the daemon's process is there.
func (s *Sheep) Running() bool {
	select {
	case <-s.exited:
		return false
	default:
		return true
	}
}

func (s *Sheep) cleanup() {
	if s.cmd != nil && s.cmd.Process != nil {
		s.cmd.Process.Kill()
		<-s.exited
	}
	if s.t.Failed() {
		log := s.Log()
		if n := len(log); n > 8000 {
			log = "…" + log[n-8000:]
		}
		s.t.Logf("log of the sheep:\n%s", log)
	}
}

// PID is the process id of the daemon.
func (s *Sheep) PID() int { return s.cmd.Process.Pid }

// Log is all that the daemon has logged, over all its starts.
func (s *Sheep) Log() string {
	b, err := os.ReadFile(s.logPath)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// NBD is the daemon's NBD address, HOST:PORT.
func (s *Sheep) NBD() string { return net.JoinHostPort(s.address, strconv.Itoa(s.NBDPort)) }

// Admin is the daemon's HTTP address, HOST:PORT.
func (s *Sheep) Admin() string {
	host := s.address
	if s.within != "" {
		host = Address
	}
	return net.JoinHostPort(host, strconv.Itoa(s.AdminPort))
}

// Native is the daemon's address of the native protocol, HOST:PORT.
func (s *Sheep) Native() string { return net.JoinHostPort(s.address, strconv.Itoa(s.NativePort)) }

// ISCSI is the URL of a VDI for libiscsi and QEMU, or with NAME.TAG of a snapshot.
func (s *Sheep) ISCSI(name string) string {
	return fmt.Sprintf("iscsi://%s:%d/%s:%s/0", s.address, s.ISCSIPort, IQN, name)
}

// IQN begins the names of targets.
const IQN = "iqn.2026-11.io.sheepdog"

// URI is the NBD URI of an export.
func (s *Sheep) URI(export string) string { return "nbd://" + s.NBD() + "/" + export }

// FromOutside is the NBD URI of an export for clients outside of the daemon's network namespace, if it has one.
func (s *Sheep) FromOutside(export string) string {
	if s.within != "" {
		return "nbd+unix:///" + export + "?socket=" + s.Unix
	}
	return s.URI(export)
}

// Dog runs the command line against this daemon; it must succeed. It returns the standard output.
func (s *Sheep) Dog(args ...string) string {
	s.t.Helper()
	r := s.DogRun(args...)
	if r.Code != 0 {
		s.t.Fatalf("dog %s: exit status %d\n%s%s", strings.Join(args, " "), r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// DogRun runs the command line against this daemon and returns what came of it.
func (s *Sheep) DogRun(args ...string) Result {
	s.t.Helper()
	return s.DogInput("", args...)
}

// DogInput is DogRun with something on standard input.
func (s *Sheep) DogInput(stdin string, args ...string) Result {
	s.t.Helper()
	program, args := s.inside(filepath.Join(bin(s.t), "dog"), append([]string{"-a", s.Admin()}, args...)...)
	return Run(s.t, 2*time.Minute, stdin, program, args...)
}

// DogJSON runs the command line with -o json and decodes its output.
func (s *Sheep) DogJSON(v any, args ...string) {
	s.t.Helper()
	out := s.Dog(append([]string{"-o", "json"}, args...)...)
	if err := json.Unmarshal([]byte(out), v); err != nil {
		s.t.Fatalf("dog -o json %s: %v in:\n%s", strings.Join(args, " "), err, out)
	}
}

// Dial opens an export with the tests' own client.
func (s *Sheep) Dial(export string) *client.Conn {
	s.t.Helper()
	c, err := client.Dial(s.nbdNetwork(), s.nbdAddress(), export)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(c.Close)
	return c
}

// RSS is the resident memory of the daemon in bytes.
func (s *Sheep) RSS() int64 {
	s.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.PID()))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, line := range Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(rest, "kB")), 10, 64)
			if err != nil {
				s.t.Fatal(err)
			}
			return kib << 10
		}
	}
	s.t.Fatal("no VmRSS")
	return 0
}

// Metric is the value of a metric without labels as the daemon shows it at /metrics.
func (s *Sheep) Metric(name string) float64 {
	s.t.Helper()
	text, err := s.fetch("/metrics", 10*time.Second)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, line := range Lines(text) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			v, err := strconv.ParseFloat(value, 64)
			if err != nil {
				s.t.Fatalf("metric %s: %v", name, err)
			}
			return v
		}
	}
	s.t.Fatalf("%s has no metric %s", s.Host(), name)
	return 0
}
