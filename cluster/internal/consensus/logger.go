package consensus

import (
	"context"
	"io"
	"log"
	"log/slog"
	"slices"
	"strings"

	"github.com/hashicorp/go-hclog"
)

// logger gives raft's and raft-wal's messages to slog, one level lower than they ask
// for: they describe the library's inner life, and what matters to an operator is
// returned as an error. With one voter "heartbeat timeout reached" is how each start
// begins.
type logger struct {
	log  *slog.Logger
	name string
	args []any
}

var _ hclog.Logger = (*logger)(nil)

const levelTrace = slog.LevelDebug - 4

func lowered(level hclog.Level) slog.Level {
	switch level {
	case hclog.Error:
		return slog.LevelWarn
	case hclog.Warn, hclog.Info:
		return slog.LevelDebug
	}
	return levelTrace
}

// unreachable are the beginnings of messages that say no more than that another node
// cannot be reached, again and again: who is down is told by others, once.
var unreachable = []string{
	"failed to heartbeat to", "failed to appendEntries to", "failed to make requestVote RPC", "failed to decode incoming command",
	"failed to pipeline appendEntries", "failed to contact", "failed to send snapshot to", "failed to install snapshot", "failed to flush response",
}

func (l *logger) Log(level hclog.Level, msg string, args ...any) {
	at := lowered(level)
	if slices.ContainsFunc(unreachable, func(s string) bool { return strings.HasPrefix(msg, s) }) {
		at = min(at, slog.LevelDebug)
	}
	if !l.log.Enabled(context.Background(), at) {
		return
	}
	l.log.Log(context.Background(), at, l.name+": "+msg, args...)
}

func (l *logger) Trace(msg string, args ...any) { l.Log(hclog.Trace, msg, args...) }
func (l *logger) Debug(msg string, args ...any) { l.Log(hclog.Debug, msg, args...) }
func (l *logger) Info(msg string, args ...any)  { l.Log(hclog.Info, msg, args...) }
func (l *logger) Warn(msg string, args ...any)  { l.Log(hclog.Warn, msg, args...) }
func (l *logger) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }

func (l *logger) IsTrace() bool { return l.enabled(hclog.Trace) }
func (l *logger) IsDebug() bool { return l.enabled(hclog.Debug) }
func (l *logger) IsInfo() bool  { return l.enabled(hclog.Info) }
func (l *logger) IsWarn() bool  { return l.enabled(hclog.Warn) }
func (l *logger) IsError() bool { return l.enabled(hclog.Error) }

func (l *logger) enabled(level hclog.Level) bool {
	return l.log.Enabled(context.Background(), lowered(level))
}

func (l *logger) ImpliedArgs() []any { return l.args }

func (l *logger) With(args ...any) hclog.Logger {
	return &logger{l.log.With(args...), l.name, append(l.args[:len(l.args):len(l.args)], args...)}
}

func (l *logger) Name() string { return l.name }

func (l *logger) Named(name string) hclog.Logger {
	return &logger{l.log, l.name + "." + name, l.args}
}

func (l *logger) ResetNamed(name string) hclog.Logger { return &logger{l.log, name, l.args} }

// SetLevel does nothing: the level is slog's.
func (l *logger) SetLevel(hclog.Level) {}

func (l *logger) GetLevel() hclog.Level {
	for _, level := range []hclog.Level{hclog.Trace, hclog.Info, hclog.Error} {
		if l.enabled(level) {
			return level
		}
	}
	return hclog.Off
}

func (l *logger) StandardLogger(o *hclog.StandardLoggerOptions) *log.Logger {
	return log.New(l.StandardWriter(o), "", 0)
}

func (l *logger) StandardWriter(*hclog.StandardLoggerOptions) io.Writer { return lineWriter{l} }

type lineWriter struct{ l *logger }

func (w lineWriter) Write(p []byte) (int, error) {
	w.l.Info(string(p))
	return len(p), nil
}
