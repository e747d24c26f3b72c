//go:build unix

package main

import (
	"os"
	"syscall"
)

// umask is what new files may not have. Reading it means setting it.
func umask() os.FileMode {
	old := syscall.Umask(0o077)
	syscall.Umask(old)
	return os.FileMode(old)
}
