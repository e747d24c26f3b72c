package peer

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/zeebo/xxh3"

	"sheepdog/cluster/state"
)

// The first message in each direction, the dialing side's first:
//
//	magic "SHPH" 4 | version 2 | length of the rest 2 | body | xxh3 of all before, 8
//
// with little-endian numbers. The body, in which strings have their length in a byte
// before them (text: in two):
//
//	kind 1 | verdict 1 | nonce 16 | node 2 | incarnation 8 | cluster | name | wanted name | text
//
// This much is the same in all versions: a node answers a version that it does not know
// with its own, so that the other side can say which it is.
const (
	helloMagic   = 0x48504853
	helloVersion = 1
	helloPrefix  = 8
	helloSum     = 8
	helloFixed   = 1 + 1 + 16 + 2 + 8
	maxRefusal   = 512 // bytes of text
	maxHello     = helloFixed + 3*(1+maxName) + 2 + maxRefusal + helloSum
)

type nonce [16]byte

// verdict is the answer to a hello.
type verdict uint8

// Verdicts. Their numbers travel.
const (
	accepted verdict = iota
	otherVersion
	otherCluster
	otherNode
	notWanted
)

func (v verdict) String() string {
	if int(v) < 5 {
		return [5]string{"accepted", "other version", "other cluster", "other node", "not wanted"}[v]
	}
	return "refused"
}

// hello is either side's first message.
type hello struct {
	version uint16
	kind    Kind
	verdict verdict // of the answer
	nonce   nonce
	from    Identity
	to      string // whom the dialing side takes the other one for
	text    string // why it is refused
}

func (h *hello) encode() []byte {
	b := make([]byte, 0, helloPrefix+maxHello)
	b = binary.LittleEndian.AppendUint32(b, helloMagic)
	b = binary.LittleEndian.AppendUint16(b, h.version)
	b = append(b, 0, 0, byte(h.kind), byte(h.verdict))
	b = append(b, h.nonce[:]...)
	b = binary.LittleEndian.AppendUint16(b, uint16(h.from.Node))
	b = binary.LittleEndian.AppendUint64(b, h.from.Incarnation)
	for _, s := range [...]string{h.from.Cluster, h.from.Name, h.to} {
		s = s[:min(len(s), maxName)]
		b = append(append(b, byte(len(s))), s...)
	}
	text := h.text[:min(len(h.text), maxRefusal)]
	b = append(binary.LittleEndian.AppendUint16(b, uint16(len(text))), text...)
	binary.LittleEndian.PutUint16(b[6:], uint16(len(b)+helloSum-helloPrefix))
	return binary.LittleEndian.AppendUint64(b, xxh3.Hash(b))
}

// What a first message can be instead of a hello.
var (
	errNoHello      = errors.New("no hello of a sheepdog node")
	errHelloDamaged = errors.New("hello is damaged")
)

// readHello receives a hello. A hello of another version comes back with that version
// and nothing else.
func readHello(r io.Reader) (hello, error) {
	b := make([]byte, helloPrefix, helloPrefix+maxHello)
	if _, err := io.ReadFull(r, b); err != nil {
		return hello{}, err
	}
	n := int(binary.LittleEndian.Uint16(b[6:]))
	switch {
	case binary.LittleEndian.Uint32(b) != helloMagic:
		return hello{}, errNoHello
	case n < helloSum || n > maxHello:
		return hello{}, fmt.Errorf("%w: length %d", errHelloDamaged, n)
	}
	b = b[:helloPrefix+n]
	if _, err := io.ReadFull(r, b[helloPrefix:]); err != nil {
		return hello{}, err
	}
	return decodeHello(b)
}

// decodeHello decodes a whole hello.
func decodeHello(b []byte) (hello, error) {
	if len(b) < helloPrefix+helloSum {
		return hello{}, errHelloDamaged
	}
	h := hello{version: binary.LittleEndian.Uint16(b[4:])}
	body, sum := b[:len(b)-helloSum], binary.LittleEndian.Uint64(b[len(b)-helloSum:])
	switch {
	case xxh3.Hash(body) != sum:
		return hello{}, errHelloDamaged
	case h.version != helloVersion:
		return h, nil
	}
	p := body[helloPrefix:]
	if len(p) < helloFixed {
		return hello{}, errHelloDamaged
	}
	h.kind, h.verdict = Kind(p[0]), verdict(p[1])
	copy(h.nonce[:], p[2:])
	h.from.Node = state.NodeID(binary.LittleEndian.Uint16(p[18:]))
	h.from.Incarnation = binary.LittleEndian.Uint64(p[20:])
	p = p[helloFixed:]
	for _, s := range [...]*string{&h.from.Cluster, &h.from.Name, &h.to} {
		if len(p) == 0 || len(p) < 1+int(p[0]) {
			return hello{}, errHelloDamaged
		}
		*s, p = string(p[1:1+p[0]]), p[1+p[0]:]
	}
	if len(p) < 2 || len(p) != 2+int(binary.LittleEndian.Uint16(p)) || len(p) > 2+maxRefusal {
		return hello{}, errHelloDamaged
	}
	h.text = strings.ToValidUTF8(string(p[2:]), "?")
	return h, nil
}

// seed is what frames of a connection are told from those of others by.
func seed(dialer, acceptor nonce) uint64 {
	return xxh3.Hash(append(dialer[:], acceptor[:]...))
}

// RefusedError is a hello's bad answer.
type RefusedError struct {
	Node   string // who refused: the name asked for, unless it said another
	Remote bool   // whether the other side refused; else this one did
	Reason string // one of a few words
	Text   string // what an operator should know
}

// Error implements error.
func (e *RefusedError) Error() string {
	if e.Remote {
		return fmt.Sprintf("refused by node %q: %s: %q", e.Node, e.Reason, e.Text)
	}
	return fmt.Sprintf("node %q is refused: %s: %s", e.Node, e.Reason, e.Text)
}

// greet says hello on a connection that this node made to the named one, and returns who
// answered.
func greet(rw io.ReadWriter, self Identity, kind Kind, to string) (remote Identity, frames uint64, err error) {
	mine := hello{version: helloVersion, kind: kind, from: self, to: to}
	rand.Read(mine.nonce[:]) // never fails
	if _, err := rw.Write(mine.encode()); err != nil {
		return Identity{}, 0, err
	}
	answer, err := readHello(rw)
	if err != nil {
		return Identity{}, 0, err
	}
	refuse := func(v verdict, format string, args ...any) error {
		return &RefusedError{Node: to, Reason: v.String(), Text: fmt.Sprintf(format, args...)}
	}
	switch {
	case answer.version != helloVersion:
		err = refuse(otherVersion, "it speaks version %d, this node version %d", answer.version, helloVersion)
	case answer.verdict != accepted:
		err = &RefusedError{Node: to, Remote: true, Reason: answer.verdict.String(), Text: answer.text}
	case answer.from.Name != to:
		err = refuse(otherNode, "node %q answers at its address", answer.from.Name)
	case answer.kind != kind:
		err = errHelloDamaged
	}
	return answer.from, seed(mine.nonce, answer.nonce), err
}

// receive answers the hello on a connection that another node made: admit says whether
// it is welcome. certified is the name in its certificate, "" if there is none.
func receive(rw io.ReadWriter, self Identity, certified string, admit func(*hello) *RefusedError) (h hello, frames uint64, err error) {
	h, err = readHello(rw)
	if err != nil {
		return h, 0, err
	}
	answer := hello{version: helloVersion, kind: h.kind, from: self}
	rand.Read(answer.nonce[:])
	if no := judge(&h, self, certified, admit); no != nil {
		answer.verdict, answer.text, err = no.verdict, no.refused.Text, no.refused
	}
	if _, werr := rw.Write(answer.encode()); err == nil && werr != nil {
		err = werr
	}
	return h, seed(h.nonce, answer.nonce), err
}

type refusal struct {
	verdict verdict
	refused *RefusedError
}

// judge decides on a hello; nil: it is welcome.
func judge(h *hello, self Identity, certified string, admit func(*hello) *RefusedError) *refusal {
	no := func(v verdict, format string, args ...any) *refusal {
		return &refusal{v, &RefusedError{Node: h.from.Name, Reason: v.String(), Text: fmt.Sprintf(format, args...)}}
	}
	_, requests := h.kind.class()
	switch {
	case h.version != helloVersion:
		return no(otherVersion, "node %s speaks version %d, the other one version %d", self.Name, helloVersion, h.version)
	case h.kind != KindRaft && !requests:
		return no(otherVersion, "node %s knows no connections of kind %d", self.Name, h.kind)
	case h.from.validate() != nil || certified != "" && h.from.Name != certified:
		return no(otherNode, "node %q says that it is node %q", certified, h.from.Name)
	case h.to != self.Name:
		return no(otherNode, "node %s is at the address of node %q", self.Name, h.to)
	case h.from.Cluster != self.Cluster && h.from.Cluster != "" && self.Cluster != "":
		return no(otherCluster, "node %s belongs to cluster %s, node %s to cluster %q", self.Name, self.Cluster, h.from.Name, h.from.Cluster)
	}
	if r := admit(h); r != nil {
		r.Node, r.Reason = h.from.Name, notWanted.String()
		return &refusal{notWanted, r}
	}
	return nil
}
