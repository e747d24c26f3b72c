package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// flockNodes is how many sheep a cluster under measurement has; it keeps as many copies.
const flockNodes = 3

// flock is a cluster under measurement: nodes on loopback addresses of their own.
type flock struct {
	bin, dir string
	network  int  // of 127.0.N.0/24
	plain    bool // without a secret: what nodes say to each other is not encrypted
	nodes    []*exec.Cmd
	logs     []bytes.Buffer
}

// startFlock starts so many nodes, which keep as many copies.
func startFlock(ctx context.Context, o options, dir string, nodes int, plain bool) (*flock, error) {
	f := &flock{bin: o.bin, dir: dir, plain: plain, nodes: make([]*exec.Cmd, nodes), logs: make([]bytes.Buffer, nodes)}
	if err := os.WriteFile(filepath.Join(dir, "secret"), []byte("the secret of the flock under measurement\n"), 0o600); err != nil {
		return nil, err
	}
	for n := 230; n < 250 && f.network == 0; n++ {
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.%d.1:7001", n)); err == nil {
			l.Close()
			f.network = n
		}
	}
	if f.network == 0 {
		return nil, errors.New("no loopback network is free")
	}
	err := f.begin(ctx)
	if err != nil {
		f.stop()
		return nil, fmt.Errorf("%w\n%s", err, f.logs[0].String())
	}
	return f, nil
}

func (f *flock) begin(ctx context.Context) error {
	for i := range f.nodes {
		if err := f.launch(i); err != nil {
			return err
		}
	}
	if err := f.until(ctx, "the first node listens", func() bool {
		l, err := net.Dial("tcp", f.host(0)+":7003")
		return err == nil && l.Close() == nil
	}); err != nil {
		return err
	}
	if err := f.dog("cluster", "format", "-c", fmt.Sprint(len(f.nodes))); err != nil {
		return err
	}
	return f.whole(ctx)
}

func (f *flock) host(i int) string { return fmt.Sprintf("127.0.%d.%d", f.network, i+1) }

func (f *flock) disk(i int) string { return filepath.Join(f.dir, fmt.Sprint("n", i+1)) }

// launch starts node i, with an empty disk if it has none.
func (f *flock) launch(i int) error {
	if err := os.MkdirAll(f.disk(i), 0o755); err != nil {
		return err
	}
	args := []string{"--name", fmt.Sprint("n", i+1), "--address", f.host(i), "--disk", f.disk(i)}
	if !f.plain {
		args = append(args, "--secret-file", filepath.Join(f.dir, "secret"))
	}
	for k := range f.nodes {
		args = append(args, "--join", f.host(k))
	}
	cmd := exec.Command(filepath.Join(f.bin, "sheep"), args...)
	cmd.Stdout, cmd.Stderr = &f.logs[i], &f.logs[i]
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	f.nodes[i] = cmd
	return nil
}

// kill ends node i as a crash would.
func (f *flock) kill(i int) {
	if f.nodes[i] != nil {
		f.nodes[i].Process.Kill()
		f.nodes[i].Wait()
		f.nodes[i] = nil
	}
}

func (f *flock) stop() {
	for i := range f.nodes {
		f.kill(i)
	}
}

func (f *flock) run(args ...string) ([]byte, error) {
	out, err := exec.Command(filepath.Join(f.bin, "dog"), append([]string{"-a", f.host(0) + ":7003", "--timeout", "10s"}, args...)...).Output()
	if err != nil {
		return nil, fmt.Errorf("dog %s: %w: %s", strings.Join(args, " "), err, stderrOf(err))
	}
	return out, nil
}

func (f *flock) dog(args ...string) error {
	_, err := f.run(args...)
	return err
}

func (f *flock) ask(v any, args ...string) error {
	out, err := f.run(append([]string{"-o", "json"}, args...)...)
	if err != nil {
		return err
	}
	return json.Unmarshal(out, v)
}

const flockPatience = 3 * time.Minute

// until waits until something is so.
func (f *flock) until(ctx context.Context, what string, is func() bool) error {
	for deadline := time.Now().Add(flockPatience); !is(); time.Sleep(20 * time.Millisecond) {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("it did not come true in %v that %s", flockPatience, what)
		}
	}
	return nil
}

// recovery is what dog shows of it.
type recovery struct {
	Moving, Degraded int
	Nodes            []struct {
		Node     string
		Learning int
	}
}

// whole waits until all nodes are up and hold what they shall.
func (f *flock) whole(ctx context.Context) error {
	return f.until(ctx, "the cluster is whole", func() bool {
		var r recovery
		var list []struct{ State string }
		if f.ask(&r, "node", "recovery") != nil || f.ask(&list, "node", "list") != nil || r.Moving+r.Degraded > 0 || len(list) != len(f.nodes) {
			return false
		}
		return !slices.ContainsFunc(list, func(n struct{ State string }) bool { return n.State != "up" })
	})
}

// cpu is what all nodes have used.
func (f *flock) cpu() (total time.Duration) {
	for _, cmd := range f.nodes {
		if cmd != nil {
			total += (&server{cmd: cmd}).cpu()
		}
	}
	return total
}

// rss is the resident memory of the largest node.
func (f *flock) rss() (most int64) {
	for _, cmd := range f.nodes {
		if cmd != nil {
			most = max(most, (&server{cmd: cmd}).rss())
		}
	}
	return most
}

// volume is a volume of the cluster through its first node, as workloads want it.
func (f *flock) volume(name string, size int64) *server {
	return &server{kind: "sheep", dir: f.dir, network: "tcp", address: f.host(0) + ":10809", export: name, size: size}
}

// settle lets what the last measurement left behind come to rest.
func (f *flock) settle() { settle(f.cpu) }
