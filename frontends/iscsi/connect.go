package iscsi

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"time"
	"unicode"

	"sheepdog/frontends/iscsi/internal/login"
	"sheepdog/frontends/iscsi/internal/pdu"
)

// connection is an initiator that logs in. It reads exactly what belongs to the login: what
// follows is the session's.
type connection struct {
	server *Server
	conn   net.Conn
	log    *slog.Logger

	tsih      uint16
	initiator string
	commandSN uint32
	statusSN  uint32
	place     place
	vols      []Volume // of its disks
}

const (
	// maxLoginData is the longest data segment of a login request, in bytes: what every
	// target takes that has not said otherwise (RFC 7143 section 13.12).
	maxLoginData = 8192
	// maxLoginRequests bounds the requests of one login.
	maxLoginRequests = 64
)

// login takes the initiator to the full feature phase. It leaves no deadline on the connection.
func (c *connection) login() (*session, error) {
	s := c.server
	if err := s.clients.Extend(c.conn, time.Now().Add(s.cfg.LoginTimeout)); err != nil {
		return nil, err
	}
	conf := login.Config{Auth: c.auth, Admit: c.mayLogin, PortalGroup: s.group()}
	rand.Read(conf.Challenge[:]) // never fails
	conf.ChallengeID = conf.Challenge[0] ^ conf.Challenge[7]
	m := login.New(conf)
	for n := range maxLoginRequests {
		if s.clients.Context().Err() != nil {
			return nil, fmt.Errorf("server is shutting down")
		}
		h, data, err := c.receive()
		if err != nil {
			return nil, err
		}
		if n == 0 {
			c.commandSN, c.statusSN = h.CommandSN(), h.ExpectedStatusSN()
			if h.TSIH() != 0 { // one connection per session, so there is none to add to
				return nil, c.refuse(h, pdu.LoginNoSession, "a connection of session %d, which is none", h.TSIH())
			}
		}
		r := m.Step(h, data)
		if r.Status != pdu.LoginOK {
			return nil, c.refuse(h, r.Status, "%s", r.Reason)
		}
		if r.Done {
			return c.begin(m, h, r)
		}
		if err := c.send(pdu.LoginReply(h, r.Flags, 0, pdu.LoginOK, len(r.Text)), r.Text); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: more than %d login requests", errProtocol, maxLoginRequests)
}

// receive reads a login request. Whoever sends anything else is disconnected.
func (c *connection) receive() (*pdu.Header, []byte, error) {
	h := new(pdu.Header)
	if _, err := io.ReadFull(c.conn, h[:]); err != nil {
		return nil, nil, err
	}
	n := h.DataSize()
	if h.Op() != pdu.OpLogin || h.ExtraSize() != 0 || n > maxLoginData {
		return nil, nil, fmt.Errorf("%w: opcode %#x with %d bytes in place of a login request", errProtocol, h.Op(), n)
	}
	data := make([]byte, pdu.Padded(n))
	if _, err := io.ReadFull(c.conn, data); err != nil {
		return nil, nil, err
	}
	return h, data[:n], nil
}

// send answers a login request.
func (c *connection) send(h pdu.Header, data []byte) error {
	h.SetNumbers(pdu.Numbers{StatusSN: c.statusSN, ExpectedSN: c.commandSN, MaxSN: c.commandSN + uint32(c.server.window) - 1})
	c.statusSN++
	b := append(h[:], data...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	_, err := c.conn.Write(b)
	return err
}

// refuse ends the login.
func (c *connection) refuse(h *pdu.Header, s pdu.LoginStatus, format string, args ...any) error {
	why := fmt.Sprintf(format, args...)
	if s == pdu.LoginAuthentication || s == pdu.LoginForbidden {
		c.server.denied.Add(1)
		c.server.loginLog.Warn(c.log, "login refused", "reason", why)
	}
	err := c.send(pdu.LoginReply(h, 0, 0, s, 0), nil)
	return errors.Join(fmt.Errorf("%w: %s", errLoginEnded, why), err)
}

// begin makes the session of a login that succeeded, and then says so.
func (c *connection) begin(m *login.Machine, h *pdu.Header, r login.Reply) (*session, error) {
	s, p := c.server, m.Params()
	if err := c.enter(p); err != nil {
		return nil, c.refuse(h, loginStatusOf(err), "%v", err)
	}
	p.Target = c.place.target
	n := newSession(s, c.conn, p, h, c)
	n.info = c.describe(p)
	if err := c.register(n); err != nil {
		c.undo(n)
		return nil, c.refuse(h, pdu.LoginOutOfResources, "%v", err)
	}
	s.clients.Enter(c.conn, n)
	reply := pdu.LoginReply(h, r.Flags, n.tsih, pdu.LoginOK, len(r.Text))
	if err := c.send(reply, r.Text); err != nil {
		n.End(err)
	}
	n.open()
	if err := c.conn.SetDeadline(time.Time{}); err != nil {
		n.End(err)
	}
	if s.clients.Context().Err() != nil {
		n.stream.Stop() // Shutdown's deadline may have been lost with this
	}
	return n, nil
}

// enter opens the volume. An earlier session of the same initiator port ends first: it is the
// same one, whose connection the initiator has given up (RFC 7143 section 6.3.5).
func (c *connection) enter(p login.Params) error {
	s := c.server
	if p.Discovery {
		return nil
	}
	// The name was looked for before; what is said of it may have changed while secrets were proven.
	if status := c.mayLogin(p.Initiator, p.Target); status != pdu.LoginOK {
		return &admitError{status}
	}
	if err := s.replace(p, c.place.target); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(s.clients.Context(), s.cfg.LoginTimeout)
	defer cancel()
	c.initiator = p.Initiator
	for _, at := range c.place.disks {
		v, err := s.open(ctx, at.disk, c.client())
		if err != nil {
			c.closeAll()
			return err
		}
		c.vols = append(c.vols, v)
	}
	return nil
}

// client says for people who has a volume open.
func (c *connection) client() string {
	return "iscsi " + c.initiator + " " + c.conn.RemoteAddr().String()
}

func (c *connection) closeAll() {
	for _, v := range c.vols {
		if err := v.Close(); err != nil {
			c.log.Warn("close of volume failed", "err", err)
		}
	}
	c.vols = nil
}

// register makes the session known.
func (c *connection) register(n *session) error {
	s := c.server
	s.mu.Lock()
	defer s.mu.Unlock()
	tsih, ok := s.takeHandle()
	if !ok {
		return errors.New("no session handle is free")
	}
	n.tsih, n.info.TSIH = tsih, tsih
	var list []*lun
	for i, v := range c.vols {
		list = append(list, s.attach(n, c.place.disks[i], v))
	}
	n.setLUNs(list)
	return nil
}

// undo takes back a session that could not be registered.
func (c *connection) undo(n *session) {
	n.stream.Finish(0, nil)
	c.closeAll()
}

// takeHandle gives a TSIH that no session has. The caller holds mu.
func (s *Server) takeHandle() (uint16, bool) {
	for range 1 << 16 {
		s.nextTSIH++
		if s.nextTSIH != 0 && !s.handles[s.nextTSIH] {
			s.handles[s.nextTSIH] = true
			return s.nextTSIH, true
		}
	}
	return 0, false
}

// replace ends the session that the initiator port has with the target, if any.
func (s *Server) replace(p login.Params, target string) error {
	var old []*session
	s.clients.Each(func(c *session) {
		if c.params.Initiator == p.Initiator && c.params.ISID == p.ISID && c.params.Target == target {
			old = append(old, c)
		}
	})
	for _, c := range old {
		c.End(errReplaced)
		select {
		case <-c.gone:
		case <-s.clients.Context().Done():
			return s.clients.Context().Err()
		case <-time.After(s.cfg.LoginTimeout / 2):
			return context.DeadlineExceeded
		}
	}
	return nil
}

func (c *connection) describe(p login.Params) SessionInfo {
	digests := "none"
	switch {
	case p.HeaderDigest && p.DataDigest:
		digests = "header and data"
	case p.HeaderDigest:
		digests = "header"
	case p.DataDigest:
		digests = "data"
	}
	i := SessionInfo{
		ID: c.server.lastID.Add(1), Peer: c.conn.RemoteAddr().String(), Listener: c.conn.LocalAddr().String(), Initiator: p.Initiator,
		Target: p.Target, User: p.User, ISID: fmt.Sprintf("%x", p.ISID), Digests: digests, Started: time.Now(),
	}
	if i.Place = c.place.group; i.Place == "" && len(c.place.disks) > 0 {
		i.Place = c.place.disks[0].disk.Name
	}
	i.ReadOnly = len(c.place.disks) > 0
	for _, at := range c.place.disks {
		i.ReadOnly = i.ReadOnly && at.disk.ReadOnly
	}
	return i
}

// targetName is the name by which initiators ask for a VDI or a snapshot.
func (s *Server) targetName(name, tag string) string {
	n := s.cfg.Prefix + ":" + name
	if tag != "" {
		n += snapshotMark + tag
	}
	return n
}

// snapshotMark separates a VDI's name from a snapshot's tag in a target's name.
const snapshotMark = "."

// resolve finds what a target's name stands for: a group, or a VDI or snapshot. A VDI's name may have a dot of its
// own, so the whole goes first; then the last dot is the mark. iSCSI names have no upper case: what is
// not found as it is may be a VDI with capitals.
func (s *Server) resolve(target string) (place, error) {
	rest, ok := cutFold(target, s.cfg.Prefix+":")
	if !ok || rest == "" {
		return place{}, notFound(target)
	}
	if p, ok := s.groupOf(strings.ToLower(rest)); ok {
		return p, nil
	}
	v := s.cfg.Volumes
	d, err := v.Find(rest, "")
	if err == nil {
		return s.own(d), nil
	}
	if i := strings.LastIndex(rest, snapshotMark); i > 0 && i+1 < len(rest) {
		if d, err := v.Find(rest[:i], rest[i+1:]); err == nil {
			return s.own(d), nil
		}
	}
	list, err := v.List(context.Background())
	if err != nil {
		return place{}, err
	}
	for _, d := range list {
		if strings.EqualFold(s.targetName(d.Name, d.Tag), target) {
			return s.own(d), nil
		}
	}
	return place{}, notFound(target)
}

func cutFold(s, prefix string) (string, bool) {
	if len(s) < len(prefix) || !strings.EqualFold(s[:len(prefix)], prefix) {
		return "", false
	}
	return s[len(prefix):], true
}

// validName reports whether a target's name can be said in a text: initiators take blanks for
// the end.
func validName(name string) bool {
	const maxName = 223
	return len(name) <= maxName && !strings.ContainsFunc(name, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) || r == ',' })
}
