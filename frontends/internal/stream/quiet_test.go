package stream

import (
	"bytes"
	"fmt"
	"log/slog"
	"testing"
)

func TestQuietLog(t *testing.T) {
	var out bytes.Buffer
	var q Quiet
	log := slog.New(slog.NewTextHandler(&out, nil))
	for i := range 1000 {
		q.Warn(log, "again", "i", i)
	}
	if n := bytes.Count(out.Bytes(), []byte("\n")); n < 1 || n > 5 {
		t.Errorf("%d lines of log", n)
	}
	if got := fmt.Sprint(q.skipped.Load() > 900); got != "true" {
		t.Error("what was left out is not counted")
	}
}
