package nbd

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"testing"
	"time"

	"sheepdog/frontends/nbd/internal/wire"
)

// authority makes certificates.
type authority struct {
	t    testing.TB
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	pool *x509.CertPool
}

func newAuthority(t testing.TB) *authority {
	a := &authority{t: t, pool: x509.NewCertPool()}
	a.key, a.cert = a.sign("test CA", nil)
	a.pool.AddCert(a.cert)
	return a
}

func (a *authority) sign(name string, parent *authority) (*ecdsa.PrivateKey, *x509.Certificate) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"localhost"},
		IsCA: parent == nil, BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	issuer, by := c, key
	if parent != nil {
		issuer, by = parent.cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, issuer, &key.PublicKey, by)
	if err != nil {
		a.t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		a.t.Fatal(err)
	}
	return key, c
}

func (a *authority) certificate(name string) tls.Certificate {
	key, c := a.sign(name, a)
	return tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: key}
}

// startTLS upgrades the client.
func (c *client) startTLS(cfg *tls.Config) error {
	c.t.Helper()
	c.expectAck(wire.NBD_OPT_STARTTLS, nil)
	conn := tls.Client(c.conn, cfg)
	if err := conn.Handshake(); err != nil {
		return err
	}
	c.conn = conn
	return nil
}

func TestTLSOptional(t *testing.T) {
	ca := newAuthority(t)
	st := newStore(map[string]int64{"vm1": 4 * mib})
	h := serve(t, st, func(c *Config) { c.TLS = &tls.Config{Certificates: []tls.Certificate{ca.certificate("localhost")}} })
	h.open("vm1", wire.Structured).disconnect() // without
	for _, headers := range allHeaders {
		c := h.connect()
		c.negotiate(wire.Extended) // forgotten with NBD_OPT_STARTTLS
		c.expectAck(wire.NBD_OPT_SET_META_CONTEXT, metaData("vm1", contextAllocation))
		if err := c.startTLS(&tls.Config{RootCAs: ca.pool, ServerName: "localhost"}); err != nil {
			t.Fatal(err)
		}
		c.expectOption(wire.NBD_OPT_STARTTLS, nil, wire.NBD_REP_ERR_INVALID)
		c.negotiate(headers)
		c.goExport("vm1")
		c.expect(wire.NBD_EINVAL, wire.NBD_CMD_BLOCK_STATUS, 0, 0, 4096, nil)
		for _, n := range []int{1, 4096, 100_000, 3 * mib} {
			p := random(n)
			c.expect(0, wire.NBD_CMD_WRITE, 0, 7, uint64(n), p)
			if !bytes.Equal(c.readData(0, 7, n), p) {
				t.Errorf("%d bytes differ over TLS", n)
			}
		}
		if s := h.Sessions(); len(s) != 1 || !s[0].TLS {
			t.Errorf("sessions: %+v", s)
		}
		c.disconnect()
		h.eventually("session stays", func() bool { return len(h.Sessions()) == 0 })
	}
}

func TestTLSRequired(t *testing.T) {
	ca := newAuthority(t)
	h := serve(t, newStore(map[string]int64{"vm1": mib}), func(c *Config) {
		c.TLS = &tls.Config{Certificates: []tls.Certificate{ca.certificate("localhost")}}
		c.TLSRequired = true
	})
	c := h.connect()
	for option, data := range map[uint32][]byte{
		wire.NBD_OPT_LIST: nil, wire.NBD_OPT_INFO: infoData("vm1"), wire.NBD_OPT_GO: infoData("vm1"), wire.NBD_OPT_STRUCTURED_REPLY: nil, 4242: []byte("x"),
		wire.NBD_OPT_EXTENDED_HEADERS: nil, wire.NBD_OPT_SET_META_CONTEXT: metaData("vm1"), wire.NBD_OPT_LIST_META_CONTEXT: metaData("vm1"),
	} {
		c.expectOption(option, data, wire.NBD_REP_ERR_TLS_REQD)
	}
	if err := c.startTLS(&tls.Config{RootCAs: ca.pool, ServerName: "localhost"}); err != nil {
		t.Fatal(err)
	}
	c.expectOption(4242, nil, wire.NBD_REP_ERR_UNSUP)
	c.goExport("vm1")
	c.disconnect()

	c = h.connect()
	c.write(optionMessage(wire.NBD_OPT_EXPORT_NAME, []byte("vm1")))
	c.expectClosed()
	c = h.connect()
	c.expectAck(wire.NBD_OPT_ABORT, nil)
}

func TestTLSClientCertificates(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	h := serve(t, newStore(map[string]int64{"vm1": mib}), func(c *Config) {
		c.TLS = &tls.Config{Certificates: []tls.Certificate{ca.certificate("localhost")}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca.pool}
		c.TLSRequired = true
	})
	c := h.connect()
	if err := c.startTLS(&tls.Config{RootCAs: ca.pool, ServerName: "localhost", Certificates: []tls.Certificate{ca.certificate("host-a")}}); err != nil {
		t.Fatal(err)
	}
	c.goExport("vm1")
	c.expect(0, wire.NBD_CMD_FLUSH, 0, 0, 0, nil)
	if s := h.Sessions(); s[0].Certificate != "CN=host-a" {
		t.Errorf("certificate %q", s[0].Certificate)
	}
	c.disconnect()
	for _, certs := range [][]tls.Certificate{nil, {other.certificate("host-b")}} {
		c := h.connect()
		if c.startTLS(&tls.Config{RootCAs: ca.pool, ServerName: "localhost", Certificates: certs}) == nil {
			c.expectClosed() // with TLS 1.3 a client learns of it at its first read
		}
	}
	h.eventually("connections stay", func() bool { return h.Counters().Connections == 0 })
}

// What is sent in the clear behind NBD_OPT_STARTTLS is not taken for what came over TLS.
func TestTLSInjection(t *testing.T) {
	ca := newAuthority(t)
	h := serve(t, newStore(map[string]int64{"vm1": mib}), func(c *Config) {
		c.TLS = &tls.Config{Certificates: []tls.Certificate{ca.certificate("localhost")}}
	})
	c := h.connect()
	c.write(append(optionMessage(wire.NBD_OPT_STARTTLS, nil), optionMessage(wire.NBD_OPT_LIST, nil)...))
	c.optionReplies(wire.NBD_OPT_STARTTLS)
	rest, _ := io.ReadAll(c.conn)
	if bytes.Contains(rest, []byte("vm1")) {
		t.Errorf("injected option was answered: %x", rest)
	}
}

// Replies of a deep queue over TLS, to a client that reads only after it has sent all.
func TestTLSDeepQueue(t *testing.T) {
	ca := newAuthority(t)
	st := newStore(map[string]int64{"vm1": 4 * mib})
	copy(st.disk("vm1").data, random(4*mib))
	h := serve(t, st, func(c *Config) { c.TLS = &tls.Config{Certificates: []tls.Certificate{ca.certificate("localhost")}} })
	c := h.connect()
	if err := c.startTLS(&tls.Config{RootCAs: ca.pool, ServerName: "localhost"}); err != nil {
		t.Fatal(err)
	}
	c.negotiate(wire.Structured)
	c.goExport("vm1")
	for i := range 500 {
		c.send(wire.NBD_CMD_READ, 0, uint64(i)*4096, 64<<10, nil)
	}
	for range 500 {
		r := c.receiveChunk(0)
		off := (r.cookie - 1) * 4096
		if !bytes.Equal(r.payload[8:], st.disk("vm1").data[off:off+64<<10]) {
			t.Fatalf("reply to %d differs", r.cookie)
		}
	}
	c.disconnect()
}
