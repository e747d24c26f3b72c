package login

import (
	"fmt"
	"strconv"
	"strings"

	"sheepdog/frontends/iscsi/internal/pdu"
)

// Config is what a login is decided by.
type Config struct {
	// Auth tells who an initiator must prove to be for a target; target is "" for discovery.
	Auth func(initiator, target string) Auth
	// Admit decides whether an initiator may log in to a target at all, and whether there is one.
	Admit func(initiator, target string) pdu.LoginStatus
	// Challenge and ChallengeID are random, made for this login alone.
	Challenge   [ChallengeSize]byte
	ChallengeID byte
	PortalGroup uint16
}

// Machine is one login, from its first request to the full feature phase. It is one
// goroutine's.
type Machine struct {
	cfg    Config
	params Params
	auth   Auth

	begun    bool
	named    bool // who, and what for, is known
	stage    byte
	step     int // of CHAP
	text     []byte
	seen     map[string]bool
	declared bool // what this target takes was said
}

// Bounds of one login.
const (
	maxText = 64 << 10 // of a text that comes in several requests, in bytes
	maxName = 223      // bytes of an iSCSI name, section 4.2.7.1
)

// New makes the machine of a login.
func New(c Config) *Machine { return &Machine{cfg: c, params: defaults(), seen: map[string]bool{}} }

// Params is what was agreed on. It is complete when a reply was Done.
func (m *Machine) Params() Params { return m.params }

// Reply is what is answered to a login request.
type Reply struct {
	Flags  byte // second byte of the response
	Status pdu.LoginStatus
	Text   []byte
	Done   bool   // the full feature phase begins
	Reason string // of a failure, for people
}

func fail(s pdu.LoginStatus, format string, args ...any) Reply {
	return Reply{Status: s, Reason: fmt.Sprintf(format, args...)}
}

// Step takes a login request with its data segment. After a reply with a Status the
// connection is to be closed.
func (m *Machine) Step(h *pdu.Header, data []byte) Reply {
	current, next := h.Stages()
	flags := h.Flags()
	switch {
	case h.VersionMin() != 0:
		return fail(pdu.LoginVersion, "version %d at least is wanted, there is 0", h.VersionMin())
	case flags&pdu.FlagTransit != 0 && flags&pdu.FlagContinue != 0:
		return fail(pdu.LoginInitiatorError, "a request that goes on in the next wants to leave its stage")
	case current != pdu.StageSecurity && current != pdu.StageOperational:
		return fail(pdu.LoginInvalid, "stage %d is none of a login", current)
	case m.begun && current != m.stage:
		return fail(pdu.LoginInvalid, "a request of stage %d in stage %d", current, m.stage)
	case flags&pdu.FlagTransit != 0 && (next <= current || next != pdu.StageOperational && next != pdu.StageFull):
		return fail(pdu.LoginInvalid, "there is no way from stage %d to stage %d", current, next)
	case m.begun && h.ISID() != m.params.ISID:
		return fail(pdu.LoginInvalid, "the session's identifier changed in the middle of a login")
	}
	if !m.begun {
		m.begun, m.stage, m.params.ISID = true, current, h.ISID()
	}
	if len(m.text)+len(data) > maxText {
		return fail(pdu.LoginOutOfResources, "a text of more than %d bytes", maxText)
	}
	m.text = append(m.text, data...)
	if flags&pdu.FlagContinue != 0 {
		return Reply{Flags: current << 2}
	}
	pairs, err := pdu.ParseText(m.text)
	m.text = nil
	if err != nil {
		return fail(pdu.LoginInitiatorError, "%v", err)
	}
	return m.request(pairs, flags&pdu.FlagTransit != 0, next)
}

// request takes a whole request.
func (m *Machine) request(pairs []pdu.Pair, transit bool, next byte) Reply {
	in := map[string]string{}
	for _, p := range pairs {
		if m.seen[p.Key] {
			return fail(pdu.LoginInitiatorError, "%s comes twice", p.Key)
		}
		m.seen[p.Key] = true
		in[p.Key] = p.Value
	}
	var out []pdu.Pair
	if !m.named {
		if bad := m.identify(in); bad.Status != pdu.LoginOK {
			return bad
		}
		m.named = true
		if !m.params.Discovery {
			out = append(out, pdu.Pair{Key: "TargetPortalGroupTag", Value: strconv.Itoa(int(m.cfg.PortalGroup))})
		}
		if m.stage == pdu.StageOperational && m.auth.required() {
			return fail(pdu.LoginAuthentication, "the initiator does not offer to prove who it is")
		}
	}
	if m.stage == pdu.StageSecurity {
		if s := m.chap(in, &out); s != pdu.LoginOK {
			return fail(s, "authentication failed")
		}
	}
	m.operational(pairs, &out)
	r := Reply{Flags: m.stage << 2}
	if transit && (m.stage != pdu.StageSecurity || m.step == chapDone) {
		if next == pdu.StageFull && m.params.FirstBurst > m.params.MaxBurst {
			m.params.FirstBurst = m.params.MaxBurst // "FirstBurstLength MUST NOT exceed MaxBurstLength"
		}
		r.Flags |= pdu.FlagTransit | next
		m.stage, r.Done = next, next == pdu.StageFull
	}
	for _, p := range out {
		r.Text = pdu.AppendText(r.Text, p.Key, p.Value)
	}
	return r
}

// identify finds out who logs in to what.
func (m *Machine) identify(in map[string]string) Reply {
	p := &m.params
	p.Initiator, p.Target = strings.ToLower(in["InitiatorName"]), in["TargetName"]
	switch kind, ok := in["SessionType"]; {
	case p.Initiator == "":
		return fail(pdu.LoginMissing, "the initiator does not say its name")
	case len(p.Initiator) > maxName || len(p.Target) > maxName:
		return fail(pdu.LoginInitiatorError, "a name of more than %d bytes", maxName)
	case ok && kind == "Discovery":
		p.Discovery, p.Target = true, ""
	case ok && kind != "Normal":
		return fail(pdu.LoginSessionType, "session type %.20q", kind)
	case p.Target == "":
		return fail(pdu.LoginMissing, "the initiator does not name a target")
	}
	if s := m.cfg.Admit(p.Initiator, p.Target); s != pdu.LoginOK {
		return fail(s, "not admitted")
	}
	m.auth = m.cfg.Auth(p.Initiator, p.Target)
	return Reply{}
}

// own are the keys that identify and chap take.
var own = map[string]bool{
	"InitiatorName": true, "TargetName": true, "SessionType": true, "AuthMethod": true,
	"CHAP_A": true, "CHAP_N": true, "CHAP_R": true, "CHAP_I": true, "CHAP_C": true,
}

// operational answers all other keys, which may come in any stage.
func (m *Machine) operational(pairs []pdu.Pair, out *[]pdu.Pair) {
	for _, p := range pairs {
		if own[p.Key] {
			continue
		}
		answer := m.answerTo(p)
		if answer != "" {
			*out = append(*out, pdu.Pair{Key: p.Key, Value: answer})
		}
	}
	if m.stage == pdu.StageOperational && !m.declared {
		m.declared = true
		*out = append(*out, pdu.Pair{Key: "MaxRecvDataSegmentLength", Value: strconv.Itoa(MaxReceive)})
	}
}

func (m *Machine) answerTo(p pdu.Pair) string {
	k := findKey(p.Key)
	switch {
	case k == nil:
		return notUnderstood
	case m.params.Discovery && onlyNormal[k.name]:
		return irrelevant
	}
	return k.fn(&m.params, p.Value)
}

// Renegotiate answers a key of a text request in the full feature phase, where few may
// still change: only the longest segment that the initiator takes, here.
func Renegotiate(p *Params, q pdu.Pair) string {
	k := findKey(q.Key)
	switch {
	case k == nil && !own[q.Key]:
		return notUnderstood
	case k == nil || !k.text:
		return reject
	}
	return k.fn(p, q.Value)
}
