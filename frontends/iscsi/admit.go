package iscsi

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"sheepdog/frontends/iscsi/access"
	"sheepdog/frontends/iscsi/internal/login"
	"sheepdog/frontends/iscsi/internal/pdu"
)

// Targets is what operators say of targets, the same on all gateways. Methods may be called from
// any number of goroutines and do not wait.
type Targets interface {
	// Target returns what is said of a VDI's target or of a group; false if nothing is.
	Target(name string) (access.Target, bool)
	// Groups are the groups there are, by name.
	Groups() []access.Target
}

type noTargets struct{}

func (noTargets) Target(string) (access.Target, bool) { return access.Target{}, false }
func (noTargets) Groups() []access.Target             { return nil }

func noSecrets(credential string) (string, string, error) {
	return "", "", fmt.Errorf("credential %q: this gateway has no directory for secrets: see iscsi.secrets", credential)
}

// admitError is a login that was refused after all.
type admitError struct{ status pdu.LoginStatus }

func (*admitError) Error() string { return "not admitted any more" }

// address is where the initiator connects from.
func (c *connection) address() netip.Addr {
	if tcp, ok := c.conn.RemoteAddr().(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr()
	}
	return netip.Addr{}
}

// mayUse applies Config.Initiators.
func (s *Server) mayUse(initiator string) bool {
	return len(s.cfg.Initiators) == 0 || slices.ContainsFunc(s.cfg.Initiators, func(n string) bool { return strings.EqualFold(n, initiator) })
}

// mayLogin decides who may log in to what before it is asked for a secret. Both the configuration and what is
// said of the target must admit it.
func (c *connection) mayLogin(initiator, target string) pdu.LoginStatus {
	s := c.server
	if !s.mayUse(initiator) {
		return pdu.LoginForbidden
	}
	if target == "" {
		return pdu.LoginOK
	}
	p, err := s.resolve(target)
	switch {
	case err != nil:
		return loginStatusOf(err)
	case !p.rules.Admits(initiator, c.address()):
		return pdu.LoginForbidden
	}
	c.place = p
	return pdu.LoginOK
}

// auth says by what secrets the login is decided: those of the target, else the
// configuration's. Where one cannot be had nobody is let in.
func (c *connection) auth(initiator, _ string) login.Auth {
	s := c.server
	chap, ok := c.place.rules.ChapFor(initiator)
	if !ok {
		d := s.cfg.Chap
		return login.Auth{User: d.User, Secret: d.Secret, OurUser: d.OurUser, OurSecret: d.OurSecret}
	}
	var a login.Auth
	var err error
	if a.User, a.Secret, err = s.cfg.Secrets(chap.Credential); err == nil && chap.Mutual != "" {
		a.OurUser, a.OurSecret, err = s.cfg.Secrets(chap.Mutual)
	}
	if err != nil || a.Secret == "" {
		s.loginLog.Warn(c.log, "login refused: a secret is missing on this gateway", "target", c.place.target, "initiator", initiator, "err", err)
		return login.Auth{Impossible: true}
	}
	return a
}

// sees reports whether discovery tells an initiator of a place.
func (s *session) sees(p place) bool {
	return p.rules.Admits(s.params.Initiator, s.from)
}

// Logout asks initiators to log out, and ends the sessions of those that have not within the time for it. which is called for
// each session with a target; the number of those for which it is true is returned.
func (s *Server) Logout(which func(SessionInfo) bool) int {
	n := 0
	s.clients.Each(func(c *session) {
		if c.params.Discovery || !which(c.snapshot()) {
			return
		}
		n++
		c.askLogout(s.cfg.LogoutTimeout)
		time.AfterFunc(s.cfg.LogoutTimeout, func() { c.End(errKicked) }) // harmless to one that has ended
	})
	return n
}
