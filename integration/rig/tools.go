// Package rig runs the product and other people's tools for the end-to-end tests: it builds or finds
// the programs, starts daemons on loopback with free ports and directories of their own, and ends by
// process id whatever it started.
package rig

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// toolPath puts the distribution's programs first: the Python of nbdsh must be Debian's.
const toolPath = "/usr/bin:/bin:/usr/sbin:/sbin"

var built struct {
	once sync.Once
	dir  string
	err  error
}

// bin returns the directory of bin/sheep and bin/dog: $SHEEP_BIN, or built once for this test run.
func bin(t testing.TB) string {
	t.Helper()
	built.once.Do(func() {
		if built.dir = os.Getenv("SHEEP_BIN"); built.dir != "" {
			return
		}
		if built.dir, built.err = os.MkdirTemp("", "sheepdog-bin-"); built.err != nil {
			return
		}
		out, err := exec.Command("go", "build", "-o", built.dir, "sheepdog/cmd/sheep", "sheepdog/cmd/dog").CombinedOutput()
		if err != nil {
			built.err = errors.New("build the programs: " + err.Error() + "\n" + string(out))
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.dir
}

// RemoveBuilt removes programs that were built for this test run. TestMain calls it at the end.
func RemoveBuilt() {
	if os.Getenv("SHEEP_BIN") == "" && built.dir != "" {
		os.RemoveAll(built.dir)
	}
}

// Need fails the test if a tool is missing: nothing is skipped silently.
func Need(t testing.TB, tools ...string) {
	t.Helper()
	for _, name := range tools {
		if Tool(name) == name {
			t.Fatalf("%s is not installed: run `make tools`", name)
		}
	}
}

// Tool returns the path of one of the distribution's programs, or the bare name if it is not there.
func Tool(name string) string {
	for _, dir := range filepath.SplitList(toolPath) {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode()&0o111 != 0 {
			return path
		}
	}
	return name
}

// Result is what a program left behind.
type Result struct {
	Command        string
	Stdout, Stderr string
	Code           int // exit status; -1 if it was killed, for instance because its time was up
}

// Run runs a program to its end, at most for the given time, and returns what came of it.
func Run(t testing.TB, limit time.Duration, stdin, program string, args ...string) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if !filepath.IsAbs(program) {
		program = Tool(program)
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), "PATH="+toolPath, "LC_ALL=C.UTF-8")
	// The whole process group goes when time is up: a shell's children must not linger.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	if stdin != "" {
		cmd.Stdin = strings.NewReader(stdin)
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	r := Result{Command: program + " " + strings.Join(args, " "), Stdout: stdout.String(), Stderr: stderr.String()}
	var exit *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &exit):
		r.Code = exit.ExitCode()
		if ctx.Err() != nil {
			r.Stderr += "\n(ended after " + limit.String() + ")"
		}
	default:
		t.Fatalf("run %s: %v", program, err)
	}
	return r
}

// toolLimit is for programs that never end.
const toolLimit = 10 * time.Minute

// OK runs a program that must succeed and returns its standard output.
func OK(t testing.TB, program string, args ...string) string {
	t.Helper()
	r := Run(t, toolLimit, "", program, args...)
	if r.Code != 0 {
		t.Fatalf("%s: exit status %d\n%s%s", r.Command, r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// Fails runs a program that must fail and returns all that it printed.
func Fails(t testing.TB, program string, args ...string) string {
	t.Helper()
	r := Run(t, toolLimit, "", program, args...)
	if r.Code <= 0 {
		t.Fatalf("%s: exit status %d, want a failure\n%s%s", r.Command, r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout + r.Stderr
}

// Contains fails the test unless text contains every one of the words.
func Contains(t testing.TB, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("no %q in:\n%s", w, text)
		}
	}
}
