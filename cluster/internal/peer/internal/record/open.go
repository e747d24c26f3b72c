package record

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// ErrRefused is a record that the other side must not have sent, or somebody else has. What
// wraps it also wraps the tls.AlertError that RFC 8446 has for it. The connection is over.
var ErrRefused = errors.New("TLS record is refused")

// What is wrong with a record: RFC 8446, 6.2.
const (
	alertCloseNotify       tls.AlertError = 0
	alertUnexpectedMessage tls.AlertError = 10
	alertBadRecordMAC      tls.AlertError = 20
	alertRecordOverflow    tls.AlertError = 22
	alertIllegalParameter  tls.AlertError = 47
	alertDecodeError       tls.AlertError = 50
	alertUserCanceled      tls.AlertError = 90
)

func refuse(alert tls.AlertError, format string, args ...any) error {
	return fmt.Errorf("%w: %s: %w", ErrRefused, fmt.Sprintf(format, args...), alert)
}

// maxUseless records may come in a row that carry no data.
const maxUseless = 16

// Opener opens what the other side sends.
type Opener struct {
	keys    keys
	limit   uint64
	message [keyUpdateSize]byte // of the handshake protocol
	have    int                 // of message
	useless int
}

// NewOpener makes an Opener from the other side's first application traffic secret, of
// which it takes a copy. suite and limit are as for NewSealer.
func NewOpener(suite uint16, secret []byte, limit uint64) (*Opener, error) {
	o := &Opener{limit: limit}
	if err := o.keys.init(suite, secret); err != nil {
		return nil, err
	}
	return o, nil
}

// Size returns the length of the record that begins with header, at least HeaderSize
// bytes, or an error if no such record may come.
func Size(header []byte) (int, error) {
	n := int(binary.BigEndian.Uint16(header[3:]))
	switch {
	case header[0] != typeData: // what is not protected ended with the handshake; the version is to be ignored
		return 0, refuse(alertUnexpectedMessage, "type %d", header[0])
	case n > maxProtected:
		return 0, refuse(alertRecordOverflow, "%d bytes", n)
	case n < overhead:
		return 0, refuse(alertDecodeError, "%d bytes", n)
	}
	return HeaderSize + n, nil
}

// Room is how much of dst Open may need for a record of a length that Size has returned.
func Room(size int) int { return size - HeaderSize - tagSize }

// Overdue reports, once for each limit records, that the other side uses a key for more than
// it should: crypto/tls does not count. It may be asked for a KeyUpdate.
func (o *Opener) Overdue() bool { return o.keys.seq > 0 && o.keys.seq%o.limit == 0 }

// Open opens a record, which is as long as Size says of it. Its content is dst[:n], which
// has room for Room(len(record)) bytes, all of which may be written; it is the record's own
// memory behind its header, or does not overlap it. n is 0 if the record carries no data.
//
// asked says that the other side wants a KeyUpdate before the next record that is sent.
// The error is io.EOF when the other side says that nothing more comes; wraps
// ErrRefused; or else wraps the tls.AlertError by which the other side has ended the
// connection. No further record can be opened after an error.
func (o *Opener) Open(dst, record []byte) (n int, asked bool, err error) {
	// An Open of the AEAD that fails clears dst.
	plain, err := o.keys.aead.Open(dst[:0], o.keys.next(), record[HeaderSize:], record[:HeaderSize])
	if err != nil {
		return 0, false, refuse(alertBadRecordMAC, "%d bytes", len(record))
	}
	// Behind the content is its type, and then as many zeros as the other side likes.
	n = len(plain) - 1
	for n >= 0 && plain[n] == 0 {
		n--
	}
	switch {
	case n < 0:
		return 0, false, refuse(alertUnexpectedMessage, "no content")
	case len(plain) > MaxContent+1:
		return 0, false, refuse(alertRecordOverflow, "%d bytes of content", len(plain)-1)
	case o.have > 0 && plain[n] != typeHandshake:
		return 0, false, refuse(alertUnexpectedMessage, "type %d within a message", plain[n])
	}
	if plain[n] == typeData && n > 0 {
		o.useless = 0
		return n, false, nil
	}
	if o.useless++; o.useless > maxUseless {
		return 0, false, refuse(alertUnexpectedMessage, "too many without data")
	}
	switch content := plain[:n]; plain[n] {
	case typeData:
		return 0, false, nil
	case typeAlert:
		return 0, false, alerted(content)
	case typeHandshake:
		asked, err = o.handshake(content)
		return 0, asked, err
	}
	return 0, false, refuse(alertUnexpectedMessage, "type %d", plain[n])
}

// alerted says what an alert means: RFC 8446, 6. Its level means nothing.
func alerted(content []byte) error {
	if len(content) != 2 {
		return refuse(alertDecodeError, "alert of %d bytes", len(content))
	}
	switch alert := tls.AlertError(content[1]); alert {
	case alertCloseNotify:
		return io.EOF
	case alertUserCanceled:
		return nil // a close_notify follows
	default:
		return fmt.Errorf("other side has ended TLS: %w", alert)
	}
}

// handshake takes a piece of a message of the handshake protocol, of which one alone may
// come, and carries it out when it is whole: RFC 8446, 4.6.3.
func (o *Opener) handshake(content []byte) (asked bool, err error) {
	if len(content) == 0 {
		return false, refuse(alertUnexpectedMessage, "empty piece of a message")
	}
	n := copy(o.message[o.have:], content)
	o.have += n
	m := o.message[:o.have]
	switch {
	case m[0] != messageKeyUpdate:
		return false, refuse(alertUnexpectedMessage, "message %d", m[0])
	case len(m) >= 4 && (m[1] != 0 || m[2] != 0 || m[3] != 1):
		return false, refuse(alertDecodeError, "KeyUpdate of a wrong length")
	case n < len(content): // RFC 8446, 5.1: keys change between records
		return false, refuse(alertUnexpectedMessage, "more behind a KeyUpdate")
	case len(m) < keyUpdateSize:
		return false, nil
	case m[4] > updateAsked:
		return false, refuse(alertIllegalParameter, "KeyUpdate %d", m[4])
	}
	asked = m[4] == updateAsked
	o.have = 0
	return asked, o.keys.update()
}
