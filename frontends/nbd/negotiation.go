package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"time"

	"sheepdog/frontends/internal/listen"
	"sheepdog/frontends/internal/stream"
	"sheepdog/frontends/nbd/internal/wire"
)

// negotiation is a client in the handshake phase. It reads exactly what it needs:
// what the client sends after NBD_OPT_STARTTLS in the clear must not be taken for
// what came over TLS, and what follows NBD_OPT_GO belongs to the session.
type negotiation struct {
	server *Server
	raw    net.Conn
	conn   net.Conn // raw, or TLS over it after NBD_OPT_STARTTLS
	log    *slog.Logger

	noZeroes bool
	fixed    bool // the client speaks fixed newstyle
	tls      bool

	headers     wire.Headers
	contexts    []metaContext // of the last NBD_OPT_SET_META_CONTEXT
	contextsFor string        // and its export

	out []byte // replies to the option at hand

	// The result.
	volume   Volume
	export   string
	selected []metaContext
}

const (
	// maxOptionData is the longest data of an option that is looked at, in bytes: long
	// enough for a name of 4096 bytes and many queries.
	maxOptionData = 64 << 10
	// maxOptionSkip is the longest that is read and thrown away in order to answer
	// NBD_REP_ERR_TOO_BIG. Whoever sends more is no client of ours.
	maxOptionSkip = 1 << 20
	// maxOptions bounds the options of one handshake. `nbdinfo --list` asks twice about
	// each export, on one connection.
	maxOptions = 1 << 15
)

// run negotiates until the client chose an export; the connection is the caller's to
// close. It leaves no deadline on the connection.
func (n *negotiation) run(ctx context.Context) error {
	if err := n.extend(); err != nil {
		return err
	}
	if err := n.greet(); err != nil {
		return err
	}
	for range maxOptions {
		if ctx.Err() != nil {
			n.refuseShutdown()
			return stream.ErrStopped
		}
		done, err := n.option(ctx)
		if err != nil {
			return err
		}
		if done {
			// Shutdown's deadline may have been lost with this: the caller looks for it.
			return n.raw.SetDeadline(time.Time{})
		}
	}
	return fmt.Errorf("%w: too many options", errProtocol)
}

// extend gives a client its time, anew if it asks about one export after another.
func (n *negotiation) extend() error {
	return n.server.clients.Extend(n.raw, time.Now().Add(n.server.cfg.HandshakeTimeout))
}

// greet exchanges handshake and client flags.
func (n *negotiation) greet() error {
	n.out = wire.AppendGreeting(n.out, wire.NBD_FLAG_FIXED_NEWSTYLE|wire.NBD_FLAG_NO_ZEROES)
	if err := n.flush(); err != nil {
		return err
	}
	var b [wire.ClientFlagsSize]byte
	if _, err := io.ReadFull(n.conn, b[:]); err != nil {
		return err
	}
	flags := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	// "the server MUST drop the TCP connection if the client sets an unknown flag".
	if unknown := flags &^ (wire.NBD_FLAG_C_FIXED_NEWSTYLE | wire.NBD_FLAG_C_NO_ZEROES); unknown != 0 {
		return fmt.Errorf("%w: unknown client flags %#x", errProtocol, unknown)
	}
	n.fixed = flags&wire.NBD_FLAG_C_FIXED_NEWSTYLE != 0
	n.noZeroes = flags&wire.NBD_FLAG_C_NO_ZEROES != 0
	return nil
}

// option reads and answers one option; done means that transmission begins.
func (n *negotiation) option(ctx context.Context) (done bool, err error) {
	var b [wire.OptionHeaderSize]byte
	if _, err := io.ReadFull(n.conn, b[:]); err != nil {
		return false, err
	}
	h, err := wire.ParseOptionHeader(b[:])
	if err != nil {
		return false, fmt.Errorf("%w: %v", errProtocol, err)
	}
	if !n.fixed && h.Option != wire.NBD_OPT_EXPORT_NAME {
		return false, errBackwards // it would not understand a reply
	}
	if h.Length > maxOptionData {
		return false, n.skipOption(h)
	}
	data := make([]byte, h.Length)
	if _, err := io.ReadFull(n.conn, data); err != nil {
		return false, err
	}
	handle, ok := n.handler(h.Option)
	if !ok {
		return false, n.fail(h.Option, wire.NBD_REP_ERR_UNSUP, fmt.Sprintf("option %d is not supported", h.Option))
	}
	return handle(ctx, h.Option, data)
}

// skipOption answers an option that is too long without looking at it.
func (n *negotiation) skipOption(h wire.OptionHeader) error {
	if h.Option == wire.NBD_OPT_EXPORT_NAME || h.Length > maxOptionSkip {
		return fmt.Errorf("%w: option %d with %d bytes of data", errProtocol, h.Option, h.Length)
	}
	if _, err := io.CopyN(io.Discard, n.conn, int64(h.Length)); err != nil {
		return err
	}
	return n.fail(h.Option, wire.NBD_REP_ERR_TOO_BIG, fmt.Sprintf("option with %d bytes of data: at most %d are taken", h.Length, maxOptionData))
}

type optionHandler func(ctx context.Context, option uint32, data []byte) (done bool, err error)

// handler returns what answers an option. With TLS required and not yet there, every
// option but three is answered NBD_REP_ERR_TLS_REQD, unknown ones too ("FORCEDTLS mode").
func (n *negotiation) handler(option uint32) (optionHandler, bool) {
	forced := n.server.cfg.TLSRequired && !n.tls
	switch option {
	case wire.NBD_OPT_EXPORT_NAME:
		return n.optExportName, true
	case wire.NBD_OPT_ABORT:
		return n.optAbort, true
	case wire.NBD_OPT_STARTTLS:
		return n.optStartTLS, true
	}
	if forced {
		return n.optNeedsTLS, true
	}
	switch option {
	case wire.NBD_OPT_LIST:
		return n.optList, true
	case wire.NBD_OPT_INFO, wire.NBD_OPT_GO:
		return n.optInfo, true
	case wire.NBD_OPT_STRUCTURED_REPLY:
		return n.optStructuredReply, true
	case wire.NBD_OPT_EXTENDED_HEADERS:
		return n.optExtendedHeaders, true
	case wire.NBD_OPT_LIST_META_CONTEXT:
		return n.optListMetaContext, true
	case wire.NBD_OPT_SET_META_CONTEXT:
		return n.optSetMetaContext, true
	}
	return nil, false
}

// flush sends what was appended to out.
func (n *negotiation) flush() error {
	_, err := n.conn.Write(n.out)
	n.out = n.out[:0]
	return err
}

// ack ends the answer to an option well.
func (n *negotiation) ack(option uint32) error {
	n.out = wire.AppendOptionReply(n.out, option, wire.NBD_REP_ACK, nil)
	return n.flush()
}

// fail ends the answer to an option with an error. What was appended before it is not sent.
func (n *negotiation) fail(option, rep uint32, message string) error {
	n.log.Debug("option refused", "option", option, "reason", message)
	n.out = wire.AppendError(n.out[:0], option, rep, message)
	return n.flush()
}

// empty answers an option that must have no data but has.
func (n *negotiation) empty(option uint32, data []byte) (ok bool, err error) {
	if len(data) == 0 {
		return true, nil
	}
	return false, n.fail(option, wire.NBD_REP_ERR_INVALID, fmt.Sprintf("option %d takes no data", option))
}

// refuseShutdown answers an option that is on its way, if one is.
func (n *negotiation) refuseShutdown() {
	var b [wire.OptionHeaderSize]byte
	n.conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := io.ReadFull(n.conn, b[:]); err != nil {
		return
	}
	if h, err := wire.ParseOptionHeader(b[:]); err == nil && h.Option != wire.NBD_OPT_EXPORT_NAME {
		if err := n.fail(h.Option, wire.NBD_REP_ERR_SHUTDOWN, stream.ErrStopped.Error()); err != nil {
			n.log.Debug("client left during shutdown", "err", err)
		}
	}
}

func (n *negotiation) optAbort(_ context.Context, option uint32, _ []byte) (bool, error) {
	if err := n.ack(option); err != nil {
		n.log.Debug("client left without waiting for its abort's reply", "err", err)
	}
	return false, errAborted
}

func (n *negotiation) optNeedsTLS(_ context.Context, option uint32, _ []byte) (bool, error) {
	return false, n.fail(option, wire.NBD_REP_ERR_TLS_REQD, "this server requires TLS")
}

// optStartTLS changes to TLS. All that was negotiated before is forgotten
// ("MUST NOT preserve any negotiation state").
func (n *negotiation) optStartTLS(ctx context.Context, option uint32, data []byte) (bool, error) {
	if ok, err := n.empty(option, data); !ok {
		return false, err
	}
	if n.tls {
		return false, n.fail(option, wire.NBD_REP_ERR_INVALID, "TLS is already in use")
	}
	if n.server.cfg.TLS == nil {
		return false, n.fail(option, wire.NBD_REP_ERR_POLICY, "this server has no TLS certificate")
	}
	if err := n.ack(option); err != nil {
		return false, err
	}
	conn := tls.Server(n.conn, n.server.cfg.TLS)
	if err := conn.HandshakeContext(ctx); err != nil {
		n.log.Info("TLS handshake failed", "err", err)
		return false, fmt.Errorf("TLS handshake: %w", err)
	}
	n.conn, n.tls = conn, true
	n.headers, n.contexts, n.contextsFor = wire.Simple, nil, ""
	return false, nil
}

func (n *negotiation) optStructuredReply(_ context.Context, option uint32, data []byte) (bool, error) {
	if ok, err := n.empty(option, data); !ok {
		return false, err
	}
	if n.headers == wire.Extended {
		return false, n.fail(option, wire.NBD_REP_ERR_EXT_HEADER_REQD, "extended headers are already in use")
	}
	n.headers = wire.Structured
	return false, n.ack(option)
}

func (n *negotiation) optExtendedHeaders(_ context.Context, option uint32, data []byte) (bool, error) {
	if ok, err := n.empty(option, data); !ok {
		return false, err
	}
	n.headers = wire.Extended
	return false, n.ack(option)
}

// describe says what was negotiated.
func (n *negotiation) describe(id uint64) SessionInfo {
	i := SessionInfo{
		ID: id, Peer: listen.PeerName(n.conn), Listener: n.conn.LocalAddr().String(), Export: n.export, Size: n.volume.Size(), ReadOnly: n.volume.ReadOnly(),
		TLS: n.tls, Headers: n.headers.String(), Started: time.Now(),
	}
	for _, c := range n.selected {
		i.Contexts = append(i.Contexts, c.name)
	}
	if conn, ok := n.conn.(*tls.Conn); ok {
		if certs := conn.ConnectionState().PeerCertificates; len(certs) > 0 {
			i.Certificate = certs[0].Subject.String()
		}
	}
	return i
}

var errNoDefault = errors.New(`there is no default export: name a VDI, as in nbd://HOST/NAME; "dog vdi list" and NBD_OPT_LIST show them`)
