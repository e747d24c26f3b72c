package login

import (
	"strconv"
	"strings"
)

// Params are what a login agreed on. Lengths are in bytes.
type Params struct {
	Initiator string // iSCSI name of the initiator
	Target    string // iSCSI name of the target; "" in a discovery session
	Discovery bool
	ISID      [6]byte
	User      string // CHAP name that the initiator proved, if it had to

	HeaderDigest  bool
	DataDigest    bool
	MaxSend       int // longest data segment that the initiator takes
	MaxBurst      int
	FirstBurst    int
	MaxR2T        int // R2Ts of one command that may be outstanding
	InitialR2T    bool
	ImmediateData bool
}

// What this target declares and wants at most.
const (
	// MaxReceive is the longest data segment that this target takes, in bytes.
	MaxReceive    = 256 << 10
	maxBurst      = 1 << 20
	firstBurst    = 256 << 10
	maxR2T        = 16
	defaultSend   = 8192 // MaxRecvDataSegmentLength of who declares none
	minSegment    = 512
	maxSegment    = 1<<24 - 1
	maxNumber     = 1<<16 - 1
	maxTimeout    = 3600
	time2Wait     = 2
	time2Retain   = 0 // error recovery level 0: nothing is kept of a lost connection
	protocolLevel = 1
)

func defaults() Params {
	return Params{MaxSend: defaultSend, MaxBurst: 256 << 10, FirstBurst: 64 << 10, MaxR2T: 1, InitialR2T: true, ImmediateData: true}
}

// Answers that are no values (RFC 7143 section 6.2).
const (
	notUnderstood = "NotUnderstood"
	irrelevant    = "Irrelevant"
	reject        = "Reject"
)

// negotiate gives the answer to a value and puts the result into Params; "" is no answer.
type negotiate func(p *Params, value string) string

// key is one that is negotiated or declared in the operational stage.
type key struct {
	name string
	fn   negotiate
	text bool // may also come in a text request of the full feature phase
}

// keys are all of RFC 7143 section 13 that an initiator may offer in a login, but for those
// that say who wants to log in, which machine.go knows.
var keys = []key{
	{name: "HeaderDigest", fn: digest(func(p *Params) *bool { return &p.HeaderDigest })},
	{name: "DataDigest", fn: digest(func(p *Params) *bool { return &p.DataDigest })},
	{name: "MaxRecvDataSegmentLength", fn: declared(func(p *Params) *int { return &p.MaxSend }, minSegment, maxSegment), text: true},
	{name: "MaxBurstLength", fn: least(func(p *Params) *int { return &p.MaxBurst }, minSegment, maxSegment, maxBurst)},
	{name: "FirstBurstLength", fn: least(func(p *Params) *int { return &p.FirstBurst }, minSegment, maxSegment, firstBurst)},
	{name: "MaxOutstandingR2T", fn: least(func(p *Params) *int { return &p.MaxR2T }, 1, maxNumber, maxR2T)},
	{name: "InitialR2T", fn: either(func(p *Params) *bool { return &p.InitialR2T }, false)},
	{name: "ImmediateData", fn: both(func(p *Params) *bool { return &p.ImmediateData }, true)},
	{name: "DataPDUInOrder", fn: either(nil, true)},
	{name: "DataSequenceInOrder", fn: either(nil, true)},
	{name: "MaxConnections", fn: least(nil, 1, maxNumber, 1)},
	{name: "ErrorRecoveryLevel", fn: least(nil, 0, 2, 0)},
	{name: "DefaultTime2Wait", fn: most(0, maxTimeout, time2Wait)},
	{name: "DefaultTime2Retain", fn: least(nil, 0, maxTimeout, time2Retain)},
	{name: "iSCSIProtocolLevel", fn: least(nil, 0, 31, protocolLevel)},
	{name: "TaskReporting", fn: choose("RFC3720")},
	{name: "InitiatorAlias", fn: noAnswer, text: true},
	// Markers are gone (RFC 7143 section 13.25), and what to say to who still asks is prescribed.
	{name: "IFMarker", fn: always("No")},
	{name: "OFMarker", fn: always("No")},
	{name: "IFMarkInt", fn: always(irrelevant)},
	{name: "OFMarkInt", fn: always(irrelevant)},
}

func findKey(name string) *key {
	for i := range keys {
		if keys[i].name == name {
			return &keys[i]
		}
	}
	return nil
}

// onlyNormal are keys that mean nothing in a discovery session (RFC 7143 section 13).
var onlyNormal = map[string]bool{
	"MaxConnections": true, "InitialR2T": true, "ImmediateData": true, "MaxBurstLength": true, "FirstBurstLength": true,
	"MaxOutstandingR2T": true, "DataPDUInOrder": true, "DataSequenceInOrder": true, "TaskReporting": true,
}

func noAnswer(*Params, string) string { return "" }

func always(answer string) negotiate { return func(*Params, string) string { return answer } }

// listed reports whether a list has a value.
func listed(list, value string) bool {
	for item := range strings.SplitSeq(list, ",") {
		if item == value {
			return true
		}
	}
	return false
}

// choose takes the one value that is possible.
func choose(value string) negotiate {
	return func(_ *Params, offered string) string {
		if listed(offered, value) {
			return value
		}
		return reject
	}
}

// digest takes what the initiator likes best of what there is.
func digest(field func(*Params) *bool) negotiate {
	return func(p *Params, offered string) string {
		for item := range strings.SplitSeq(offered, ",") {
			switch item {
			case "CRC32C":
				*field(p) = true
				return item
			case "None":
				*field(p) = false
				return item
			}
		}
		return reject
	}
}

// number reads a value as section 6.1 has it: decimal or 0x hexadecimal.
func number(value string, low, high int) (int, bool) {
	base := 10
	if hex, ok := cutHex(value); ok {
		value, base = hex, 16
	}
	n, err := strconv.ParseUint(value, base, 32)
	if err != nil || int64(n) < int64(low) || int64(n) > int64(high) {
		return 0, false
	}
	return int(n), true
}

func cutHex(s string) (string, bool) {
	if len(s) > 2 && s[0] == '0' && (s[1] == 'x' || s[1] == 'X') {
		return s[2:], true
	}
	return s, false
}

func declared(field func(*Params) *int, low, high int) negotiate {
	return func(p *Params, value string) string {
		n, ok := number(value, low, high)
		if !ok {
			return reject
		}
		*field(p) = n
		return ""
	}
}

func least(field func(*Params) *int, low, high, ours int) negotiate {
	return func(p *Params, value string) string {
		n, ok := number(value, low, high)
		if !ok {
			return reject
		}
		n = min(n, ours)
		if field != nil {
			*field(p) = n
		}
		return strconv.Itoa(n)
	}
}

func most(low, high, ours int) negotiate {
	return func(_ *Params, value string) string {
		n, ok := number(value, low, high)
		if !ok {
			return reject
		}
		return strconv.Itoa(max(n, ours))
	}
}

func truth(value string) (is, ok bool) { return value == "Yes", value == "Yes" || value == "No" }

func yesNo(b bool) string {
	if b {
		return "Yes"
	}
	return "No"
}

// either is a switch that is on if one side wants it.
func either(field func(*Params) *bool, ours bool) negotiate {
	return boolean(field, func(theirs bool) bool { return theirs || ours })
}

// both is a switch that is on if both sides want it.
func both(field func(*Params) *bool, ours bool) negotiate {
	return boolean(field, func(theirs bool) bool { return theirs && ours })
}

func boolean(field func(*Params) *bool, result func(bool) bool) negotiate {
	return func(p *Params, value string) string {
		theirs, ok := truth(value)
		if !ok {
			return reject
		}
		r := result(theirs)
		if field != nil {
			*field(p) = r
		}
		return yesNo(r)
	}
}
