//go:build unix

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// Targets that are not files can be finished.
func TestTargetOfPipe(t *testing.T) {
	name := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(name, 0o600); err != nil {
		t.Skip(err)
	}
	read := make(chan error, 1)
	go func() {
		b, err := os.ReadFile(name)
		if err == nil && string(b) != "content" {
			err = fmt.Errorf("it got %q", b)
		}
		read <- err
	}()
	a := &app{}
	f, err := a.openTarget(name, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.put([]byte("content")); err != nil {
		t.Fatal(err)
	}
	if err := f.commit(-1); err != nil {
		t.Errorf("finish: %v", err)
	}
	if err := <-read; err != nil {
		t.Error(err)
	}
}
