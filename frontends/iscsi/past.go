package iscsi

import (
	"fmt"

	"sheepdog/frontends/internal/stream"
	"sheepdog/vdi"
)

// A gateway that hangs, or is cut off, has commands in hand that its initiators have given up: they have
// sent them again through another gateway, and other ones after that. Such a command may lie in the socket,
// and be read only when the gateway goes on: its age cannot be told from when it was read. What can be told is
// when the socket was last found empty, for all that is read later came later.
//
// Nobody else has owned a disk without this gateway's doing, but for a time in which it had no lease. So what a session
// receives is of the time in which the socket was last empty, counted in lapses of the lease; and a command that
// needs the disk's ownership, and is of the time before a lapse, is answered BUSY. An initiator that still waits for an
// answer sends it anew; nobody hears it else. A command that needs no new ownership is carried out: nobody else
// owned the disk in the meantime.

// watchLapses has the session know when its socket was last empty.
func (s *session) watchLapses() {
	s.lapses.since = s.server.cfg.Volumes.Lapses()
	s.lapses.tried = s.lapses.since
	s.stream.OnEmpty(func() { s.lapses.since = s.lapses.tried })
}

// tryToReceive is called before the socket is looked at.
func (s *session) tryToReceive() { s.lapses.tried = s.server.cfg.Volumes.Lapses() }

// past fails if the command may be one of the past: that its initiator has given up, and sent through
// another gateway.
func (t *task) past() error {
	if err := stream.Left(t.s.ctx, "initiator"); err != nil {
		return err
	}
	if now := t.s.server.cfg.Volumes.Lapses(); now != t.lapses || now%2 == 1 {
		return fmt.Errorf("command may be from before this gateway was taken for gone: %w", vdi.ErrStale)
	}
	return nil
}
