package main

import (
	"io"
	"time"

	"github.com/schollz/progressbar/v3"
)

// progress shows how far long work has come, if somebody looks at the standard error. All
// its methods do nothing else, and may be called on nil.
type progress struct{ bar *progressbar.ProgressBar }

// progress begins; total is in bytes, or in steps, or -1 if not known.
func (a *app) progress(what string, total int64, isBytes bool) *progress {
	if !a.terminal(a.err) {
		return nil
	}
	return &progress{progressbar.NewOptions64(total,
		progressbar.OptionSetWriter(a.err), progressbar.OptionSetDescription(printable(what)), progressbar.OptionShowBytes(isBytes),
		progressbar.OptionUseIECUnits(true), progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish(),
		progressbar.OptionSetWidth(30), progressbar.OptionShowCount(), progressbar.OptionSetPredictTime(total > 0))}
}

// Only the terminal could fail here, and then there is nobody to tell.

func (p *progress) set(n int64) {
	if p != nil {
		p.bar.Set64(n)
	}
}

func (p *progress) total(n int64) {
	if p != nil && n != p.bar.GetMax64() {
		p.bar.ChangeMax64(n)
	}
}

func (p *progress) add(n int) {
	if p != nil {
		p.bar.Add(n)
	}
}

func (p *progress) end() {
	if p != nil {
		p.bar.Clear()
	}
}

// counted shows what is read of r.
func (p *progress) counted(r io.Reader) io.Reader {
	if p == nil {
		return r
	}
	return &countedReader{r, p}
}

type countedReader struct {
	r io.Reader
	p *progress
}

// Read implements io.Reader.
func (c *countedReader) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.p.add(n)
	return n, err
}
