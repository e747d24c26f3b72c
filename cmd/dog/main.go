// Dog is the command line of Sheepdog. It talks to the admin API of a sheep; "dog help"
// tells what it can do, "dog help output" what its output is made of. It answers to
// "collie", its older name, too.
//
// It ends with status 0 if all was done, 1 if something failed, 2 if it was called wrongly.
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/term"
)

// version is set when the program is built.
var version = "unknown"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	os.Exit(run(ctx, world{
		args: os.Args, in: os.Stdin, out: os.Stdout, err: os.Stderr, getenv: os.Getenv, zone: time.Local,
		terminal: func(f any) bool { file, ok := f.(*os.File); return ok && term.IsTerminal(int(file.Fd())) },
	}))
}

// world is what surrounds the program.
type world struct {
	args     []string
	in       io.Reader
	out, err io.Writer
	getenv   func(string) string
	zone     *time.Location // of times in tables
	terminal func(file any) bool
}

// program is the name that the program was called by.
func (w *world) program() string {
	if len(w.args) > 0 && filepath.Base(w.args[0]) == "collie" {
		return "collie"
	}
	return "dog"
}

// Exit statuses.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

// run carries out one call of the program and returns its exit status.
func run(ctx context.Context, w world) int {
	a := &app{world: w, ctx: ctx}
	root := a.root()
	root.SetArgs(w.args[min(1, len(w.args)):])
	cmd, err := root.ExecuteContextC(ctx)
	if a.api != nil {
		a.api.Close()
	}
	return a.report(cmd, err)
}
