package api

import (
	"io"
	"sync/atomic"
)

// gate is the body of an upload. It remembers why what is below failed, to tell that from
// a broken connection. Once it is shut no new Read of what is below begins; one that waits
// for input goes on waiting, since nothing can interrupt it.
type gate struct {
	r    io.Reader
	shut atomic.Bool
	err  atomic.Pointer[error]
}

// Read implements io.Reader.
func (g *gate) Read(p []byte) (int, error) {
	if g.shut.Load() {
		return 0, io.ErrClosedPipe
	}
	n, err := g.r.Read(p)
	if err != nil && err != io.EOF {
		g.err.CompareAndSwap(nil, &err)
	}
	return n, err
}

func (g *gate) close() { g.shut.Store(true) }

func (g *gate) failure() error {
	if err := g.err.Load(); err != nil {
		return *err
	}
	return nil
}
