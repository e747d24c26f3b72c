package iscsi

import (
	"context"
	"strconv"
	"strings"

	"sheepdog/frontends/iscsi/internal/login"
	"sheepdog/frontends/iscsi/internal/pdu"
)

// textExchange is the answer to a text request that does not fit one PDU.
type textExchange struct {
	tag  uint32 // transfer tag by which the rest is asked for
	rest []byte
	cost int64
}

// maxTargets bounds the text that lists targets, in bytes: 10000 volumes with several portals.
const maxTargets = 8 << 20

// takeNOP answers a ping, or takes the answer to ours.
func (s *session) takeNOP(h *pdu.Header, seg *segment) error {
	if h.TaskTag() == pdu.NoTag {
		s.mu.Lock()
		s.pings = 0
		s.mu.Unlock()
		if !h.Immediate() {
			s.credit()
		}
		return nil
	}
	var data []byte
	var cost int64
	if n := min(len(seg.whole), int(s.maxSend.Load())); n > 0 && s.stream.TryCharge(int64(n)) {
		data, cost = append([]byte(nil), seg.whole[:n]...), int64(n)
	}
	a := &answer{header: pdu.NOPIn(h.LUN(), h.TaskTag(), pdu.NoTag, len(data)), data: data, credit: !h.Immediate(), cost: cost}
	s.put(a)
	return nil
}

// takeText answers a text request (RFC 7143 section 11.10).
func (s *session) takeText(h *pdu.Header, seg *segment) error {
	s.stats.texts.Add(1)
	switch {
	case h.TransferTag() != pdu.NoTag:
		if s.text.rest == nil || h.TransferTag() != s.text.tag {
			return s.refuseText(h, pdu.RejectInvalid)
		}
	case h.Flags()&pdu.FlagContinue != 0 || !h.Final() || seg.size > 0 && seg.whole == nil:
		return s.refuseText(h, pdu.RejectUnsupported) // no request of ours needs two PDUs
	default:
		s.endText()
		pairs, err := pdu.ParseText(seg.whole)
		if err != nil {
			return s.refuseText(h, pdu.RejectProtocol)
		}
		b, ok := s.answerText(pairs)
		if !ok || !s.stream.TryCharge(int64(len(b))) {
			return s.refuseText(h, pdu.RejectNegotiation)
		}
		s.text = textExchange{rest: b, cost: int64(len(b))}
	}
	s.sendText(h)
	return nil
}

func (s *session) refuseText(h *pdu.Header, reason byte) error {
	s.endText()
	s.reject(h, reason)
	if !h.Immediate() {
		s.credit()
	}
	return nil
}

func (s *session) endText() {
	if s.text.cost != 0 {
		s.stream.Uncharge(s.text.cost)
	}
	s.text = textExchange{}
}

// sendText sends as much of the answer as fits.
func (s *session) sendText(h *pdu.Header) {
	n := min(len(s.text.rest), int(s.maxSend.Load()))
	part := append([]byte(nil), s.text.rest[:n]...)
	s.text.rest = s.text.rest[n:]
	last, tag := len(s.text.rest) == 0, uint32(pdu.NoTag)
	if !last {
		s.mu.Lock()
		s.nextTag = (s.nextTag + 1) &^ (1 << 31)
		tag = s.nextTag
		s.mu.Unlock()
		s.text.tag = tag
	} else {
		s.endText()
	}
	s.finish(h, pdu.TextReply(h.TaskTag(), tag, last, len(part)), part)
}

// answerText answers the pairs of a request.
func (s *session) answerText(pairs []pdu.Pair) ([]byte, bool) {
	var b []byte
	for _, p := range pairs {
		if p.Key == "SendTargets" {
			var ok bool
			if b, ok = s.sendTargets(b, p.Value); !ok {
				return nil, false
			}
			continue
		}
		params := s.params
		if answer := login.Renegotiate(&params, p); answer != "" {
			b = pdu.AppendText(b, p.Key, answer)
		}
		s.maxSend.Store(int64(params.MaxSend))
	}
	return b, true
}

// sendTargets lists targets with all portals that may serve them (RFC 7143 appendix C).
func (s *session) sendTargets(b []byte, which string) ([]byte, bool) {
	srv := s.server
	switch {
	case which == "" && !s.params.Discovery:
		return s.appendTarget(b, s.params.Target), true
	case which == "All" && !s.params.Discovery, which == "":
		return b, false // "All" is for discovery sessions
	case which != "All":
		if p, err := srv.resolve(which); err == nil && s.sees(p) {
			b = s.appendTarget(b, p.target)
		}
		return b, true
	}
	for _, t := range srv.cfg.Targets.Groups() {
		if p, ok := srv.groupOf(t.Name); ok && s.sees(p) {
			b = s.appendTarget(b, p.target)
		}
	}
	list, err := srv.cfg.Volumes.List(context.Background())
	if err != nil {
		return b, false
	}
	for _, d := range list {
		p := srv.own(d)
		if _, group := srv.groupOf(strings.ToLower(d.Name)); group && d.Tag == "" || !validName(p.target) || !s.sees(p) {
			continue // nobody could log in to it, or this one could not
		}
		if b = s.appendTarget(b, p.target); len(b) > maxTargets {
			return nil, false
		}
	}
	return b, true
}

// appendTarget names a target: this portal first, then those of other gateways.
func (s *session) appendTarget(b []byte, target string) []byte {
	b = pdu.AppendText(b, "TargetName", target)
	own := s.conn.LocalAddr().String() + "," + strconv.Itoa(int(s.server.group()))
	b = pdu.AppendText(b, "TargetAddress", own)
	for _, p := range s.server.cfg.Portals() {
		if p != own {
			b = pdu.AppendText(b, "TargetAddress", p)
		}
	}
	return b
}

// takeLogout ends the session. What is under way ends without an answer.
func (s *session) takeLogout(h *pdu.Header) error {
	response := byte(pdu.LogoutDone)
	switch h.LogoutReason() {
	case pdu.LogoutSession:
	case pdu.LogoutConnection:
		if h.ConnectionID() != s.cid {
			response = pdu.LogoutNoCID
		}
	default:
		response = pdu.LogoutNoRecovery
	}
	if response == pdu.LogoutDone {
		s.abort(newWaiter(nil), func(*task) bool { return true })
		s.stream.FinishBatch()
		for _, l := range s.units() {
			l.unit.forget(s) // before it is answered: others may want what it has reserved
		}
	}
	s.finish(h, pdu.LogoutReply(h.TaskTag(), response), nil)
	if response != pdu.LogoutDone {
		return nil
	}
	return errLogout
}
