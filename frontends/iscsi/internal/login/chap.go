package login

import (
	"bytes"
	"crypto/md5"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"

	"sheepdog/frontends/iscsi/internal/pdu"
)

// Auth is who must be proven to be who (RFC 7143 section 12.1). The zero value lets
// everybody in.
type Auth struct {
	User, Secret string // of the initiator
	// OurUser and OurSecret prove the target to initiators that ask; "": it cannot be proven.
	OurUser, OurSecret string
	// Impossible: nobody can prove anything, for the secret cannot be had.
	Impossible bool
}

func (a Auth) required() bool { return a.Secret != "" || a.Impossible }

// ChallengeSize is the length of a challenge, in bytes.
const ChallengeSize = 16

// chapMD5 is the algorithm that everybody has to have.
const chapMD5 = "5"

const (
	maxChallenge = 1024 // bytes; RFC 7143 section 12.1.4
	maxIdent     = 255
)

func chapResponse(id byte, secret string, challenge []byte) []byte {
	h := md5.New()
	h.Write([]byte{id})
	h.Write([]byte(secret))
	h.Write(challenge)
	return h.Sum(nil)
}

// binaryValue reads a value that is 0x hexadecimal or 0b base64.
func binaryValue(s string) ([]byte, error) {
	if h, ok := cutHex(s); ok {
		if len(h)%2 == 1 {
			h = "0" + h
		}
		return hex.DecodeString(h)
	}
	if len(s) > 2 && s[0] == '0' && (s[1] == 'b' || s[1] == 'B') {
		return base64.StdEncoding.DecodeString(s[2:])
	}
	return nil, fmt.Errorf("%.20q is no binary value", s)
}

// Steps of CHAP.
const (
	chapMethod    = iota // AuthMethod is not agreed on
	chapAlgorithm        // CHAP_A is waited for
	chapProof            // CHAP_N and CHAP_R are waited for
	chapDone
)

// chap takes the keys of a request of the security stage that are CHAP's.
func (m *Machine) chap(in map[string]string, out *[]pdu.Pair) pdu.LoginStatus {
	switch m.step {
	case chapMethod:
		return m.chapMethod(in, out)
	case chapAlgorithm:
		if _, ok := in["CHAP_A"]; !ok {
			return pdu.LoginMissing
		}
		if !listed(in["CHAP_A"], chapMD5) {
			return pdu.LoginAuthentication
		}
		*out = append(*out, pdu.Pair{Key: "CHAP_A", Value: chapMD5}, pdu.Pair{Key: "CHAP_I", Value: strconv.Itoa(int(m.cfg.ChallengeID))},
			pdu.Pair{Key: "CHAP_C", Value: "0x" + hex.EncodeToString(m.cfg.Challenge[:])})
		m.step = chapProof
	case chapProof:
		return m.chapProof(in, out)
	}
	return pdu.LoginOK
}

func (m *Machine) chapMethod(in map[string]string, out *[]pdu.Pair) pdu.LoginStatus {
	offered, ok := in["AuthMethod"]
	switch {
	case m.auth.required() && !ok:
		return pdu.LoginAuthentication
	case m.auth.required() && !listed(offered, "CHAP"):
		return pdu.LoginAuthentication
	case m.auth.required():
		m.step = chapAlgorithm
		*out = append(*out, pdu.Pair{Key: "AuthMethod", Value: "CHAP"})
	case ok && !listed(offered, "None"):
		*out = append(*out, pdu.Pair{Key: "AuthMethod", Value: reject})
		return pdu.LoginAuthentication // there is no secret to check anything by
	case ok:
		m.step = chapDone
		*out = append(*out, pdu.Pair{Key: "AuthMethod", Value: "None"})
	default:
		m.step = chapDone
	}
	return pdu.LoginOK
}

func (m *Machine) chapProof(in map[string]string, out *[]pdu.Pair) pdu.LoginStatus {
	name, named := in["CHAP_N"]
	proof, err := binaryValue(in["CHAP_R"])
	if !named || in["CHAP_R"] == "" {
		return pdu.LoginMissing
	}
	if m.auth.Impossible {
		return pdu.LoginAuthentication
	}
	want := chapResponse(m.cfg.ChallengeID, m.auth.Secret, m.cfg.Challenge[:])
	right := subtle.ConstantTimeCompare(proof, want) & subtle.ConstantTimeCompare([]byte(name), []byte(m.auth.User))
	if err != nil || right != 1 {
		return pdu.LoginAuthentication
	}
	m.step = chapDone
	m.params.User = name
	return m.proveOurselves(in, out)
}

// proveOurselves answers a challenge of the initiator's.
func (m *Machine) proveOurselves(in map[string]string, out *[]pdu.Pair) pdu.LoginStatus {
	ident, asked := in["CHAP_I"]
	text, challenged := in["CHAP_C"]
	if !asked && !challenged {
		return pdu.LoginOK
	}
	id, ok := number(ident, 0, maxIdent)
	challenge, err := binaryValue(text)
	if !ok || err != nil || len(challenge) == 0 || len(challenge) > maxChallenge || m.auth.OurSecret == "" {
		return pdu.LoginAuthentication
	}
	// Who sends our own challenge back wants us to make the answer to it (RFC 7143 section 9.2.1).
	if bytes.Equal(challenge, m.cfg.Challenge[:]) {
		return pdu.LoginAuthentication
	}
	*out = append(*out, pdu.Pair{Key: "CHAP_N", Value: m.auth.OurUser},
		pdu.Pair{Key: "CHAP_R", Value: "0x" + strings.ToLower(hex.EncodeToString(chapResponse(byte(id), m.auth.OurSecret, challenge)))})
	return pdu.LoginOK
}
