package members

import (
	"context"
	"log/slog"
	"strings"
)

const levelTrace = slog.LevelDebug - 4

// listener takes the messages of serf, memberlist and mdns. They describe the libraries'
// inner life, and go to slog two levels lower than they ask for; but some are the only
// sign of things that matter. Write is called with locks of memberlist held.
type listener struct{ m *Members }

const (
	suspectPrefix = "memberlist: Suspect "
	suspectSuffix = " has failed, no acks received"
)

// Write implements io.Writer, for lines like "[WARN] memberlist: text".
func (l listener) Write(p []byte) (int, error) {
	line := strings.TrimSpace(string(p))
	level, text := levelTrace, line
	if rest, ok := strings.CutPrefix(line, "["); ok {
		if name, message, ok := strings.Cut(rest, "] "); ok {
			text = message
			if name == "ERR" || name == "WARN" {
				level = slog.LevelDebug
			}
		}
	}
	if name, ok := strings.CutPrefix(text, suspectPrefix); ok {
		l.m.suspects(strings.TrimSuffix(name, suspectSuffix))
	}
	if level == slog.LevelDebug {
		l.m.refusedSecret("", text)
	}
	l.m.cfg.Logger.Log(context.Background(), level, text)
	return len(p), nil
}
