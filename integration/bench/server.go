package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// server is one NBD server under measurement, with a volume of its own on the disk.
type server struct {
	kind    string
	dir     string // its place on the disk
	network string // of its address: tcp or unix
	address string
	export  string
	size    int64 // bytes of the volume now

	delay time.Duration
	bin   string
	admin string // sheep's admin address
	count int    // fresh volumes so far
	cmd   *exec.Cmd
	log   bytes.Buffer
}

const host = "127.0.0.1"

// startServer starts a server with a volume full of data.
func startServer(ctx context.Context, kind string, o options, base string, delay time.Duration) (*server, error) {
	s := &server{kind: kind, dir: filepath.Join(base, kind), network: o.transport, delay: delay, bin: o.bin}
	if err := os.Mkdir(s.dir, 0o755); err != nil {
		return nil, err
	}
	var err error
	if s.address, err = s.listenAddress(); err != nil {
		return nil, err
	}
	if kind == "sheep" {
		err = s.startSheep(ctx)
	}
	if err == nil {
		err = s.fresh(ctx, int64(o.sizeMiB)<<20)
	}
	if err == nil {
		err = s.prefill(ctx, o)
	}
	if err != nil {
		s.stop()
		return nil, fmt.Errorf("%w\n%s", err, s.log.String())
	}
	return s, nil
}

func (s *server) listenAddress() (string, error) {
	if s.network == "unix" {
		return filepath.Join(os.TempDir(), fmt.Sprintf("bench-%d-%s.sock", os.Getpid(), s.kind)), nil
	}
	return freeAddress()
}

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", host+":0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// uri names the volume for NBD clients.
func (s *server) uri() string {
	if s.network == "unix" {
		return "nbd+unix:///" + s.export + "?socket=" + s.address
	}
	return "nbd://" + s.address + "/" + s.export
}

func (s *server) startSheep(ctx context.Context) error {
	var err error
	if s.admin, err = freeAddress(); err != nil {
		return err
	}
	data := filepath.Join(s.dir, "disk")
	if err := os.Mkdir(data, 0o755); err != nil {
		return err
	}
	config := fmt.Sprintf("node: {name: bench, address: %s}\nlisten:\n  native: none\n  admin: %q\n", host, s.admin)
	if s.network == "tcp" {
		config += fmt.Sprintf("  nbd: %q\n", s.address)
	} else {
		config += fmt.Sprintf("nbd:\n  unix: %q\n", s.address)
	}
	if s.delay > 0 {
		config += fmt.Sprintf("debug:\n  store_delay: %v\n", s.delay)
	}
	path := filepath.Join(s.dir, "sheep.yaml")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		return err
	}
	return s.launch(ctx, filepath.Join(s.bin, "sheep"), "--standalone", "--data", data, "--config", path)
}

func (s *server) dog(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, filepath.Join(s.bin, "dog"), append([]string{"-a", s.admin}, args...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("dog %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// launch starts the server's process and waits until it listens.
func (s *server) launch(ctx context.Context, program string, args ...string) error {
	s.cmd = exec.Command(program, args...)
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.cmd = nil
		return err
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		conn, err := net.Dial(s.network, s.address)
		if err == nil {
			return conn.Close()
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("%s does not listen: %w", s.kind, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (s *server) stop() {
	if s.cmd == nil {
		return
	}
	s.cmd.Process.Signal(syscall.SIGTERM)
	done := make(chan struct{})
	go func() { s.cmd.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		s.cmd.Process.Kill()
		<-done
	}
	s.cmd = nil
	if s.network == "unix" {
		os.Remove(s.address)
	}
}

// fresh gives the server an empty, sparse volume of a size.
func (s *server) fresh(ctx context.Context, size int64) error {
	s.count++
	s.size = size
	if s.kind == "sheep" {
		old := s.export
		s.export = fmt.Sprintf("vm%d", s.count)
		if old != "" {
			if err := s.dog(ctx, "vdi", "delete", old); err != nil {
				return err
			}
		}
		return s.dog(ctx, "vdi", "create", s.export, fmt.Sprint(size))
	}
	s.stop()
	file := filepath.Join(s.dir, "volume")
	if err := os.RemoveAll(file); err != nil {
		return err
	}
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		return err
	}
	if err := os.Truncate(file, size); err != nil {
		return err
	}
	name, port, err := net.SplitHostPort(s.address)
	if s.network == "tcp" && err != nil {
		return err
	}
	return s.launch(ctx, s.kind, s.peerArgs(file, name, port)...)
}

// peerArgs is the command line of nbdkit or qemu-nbd: as quick as they go with writes cached until a flush, like
// sheep's, and holes punched.
func (s *server) peerArgs(file, name, port string) []string {
	if s.kind == "qemu-nbd" {
		args := []string{"-f", "raw", "-t", "-e", "16", "--discard=unmap", "--cache=writeback"}
		if s.network == "unix" {
			return append(args, "-k", s.address, file)
		}
		return append(args, "-b", name, "-p", port, file)
	}
	args := []string{"-f", "-t", "32", "-i", name, "-p", port}
	if s.network == "unix" {
		args = []string{"-f", "-t", "32", "-U", s.address}
	}
	if s.delay == 0 {
		return append(args, "file", file)
	}
	ms := s.delay.Milliseconds()
	return append(args, "--filter=delay", "file", file, fmt.Sprintf("delay-read=%dms", ms), fmt.Sprintf("delay-write=%dms", ms))
}

// prefill writes the whole volume, so that reads find data and writes find allocated
// blocks, and then as much at random places: servers are compared as they are in use, with
// their logs as long as they get.
func (s *server) prefill(ctx context.Context, o options) error {
	source, _, err := image(o, filepath.Dir(s.dir), "full")
	if err != nil {
		return err
	}
	if _, _, err = timed(ctx, s.size, "nbdcopy", "--flush", source, s.uri()); err != nil || s.delay > 0 {
		return err
	}
	_, _, err = timed(ctx, s.size, "fio", "--name=use", "--ioengine=nbd", "--uri="+s.uri(), "--rw=randwrite", "--bs=64k", "--iodepth=16",
		fmt.Sprintf("--size=%dM", o.sizeMiB), "--end_fsync=1", "--output="+os.DevNull)
	return err
}

// measure runs one case and adds what the server's process took for it.
func (s *server) measure(ctx context.Context, c workload, o options) (measurement, error) {
	before, pid := s.cpu(), s.pid()
	value, ops, err := c.run(ctx, s, o)
	if err != nil {
		return measurement{}, err
	}
	m := measurement{value: value, ops: ops, cpu: s.cpu(), rss: s.rss()}
	if pid == s.pid() { // else the server began anew for this case
		m.cpu -= before
	}
	return m, nil
}

func (s *server) pid() int {
	if s.cmd == nil {
		return 0
	}
	return s.cmd.Process.Pid
}

// cpu is the time that the server's process has run, user and system.
func (s *server) cpu() time.Duration { return cpuOfProcess(s.pid()) }

// rss is the resident memory of the server's process in bytes.
func (s *server) rss() int64 { return rssOfProcess(s.pid()) }

// cpuOfProcess is the time that a process has run, user and system; 0 if there is none.
func cpuOfProcess(pid int) time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 13 {
		return 0
	}
	user, _ := strconv.ParseInt(fields[11], 10, 64)
	system, _ := strconv.ParseInt(fields[12], 10, 64)
	const ticksPerSecond = 100 // USER_HZ, the same on every Linux architecture that Go knows
	return time.Duration(user+system) * time.Second / ticksPerSecond
}

// rssOfProcess is the resident memory of a process in bytes; 0 if there is none.
func rssOfProcess(pid int) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(b))
	if len(fields) < 2 {
		return 0
	}
	pages, _ := strconv.ParseInt(fields[1], 10, 64)
	return pages * int64(os.Getpagesize())
}
