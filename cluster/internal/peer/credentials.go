package peer

import (
	"bytes"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"time"
)

const (
	// MinSecret is the shortest secret, in bytes without white space around it. Nothing
	// slows down somebody who guesses: a secret has to be random, not a word.
	MinSecret = 16
	// MaxSecret is the longest, in bytes.
	MaxSecret = 4096
	// GossipKeySize is the length of the gossip key, in bytes: AES-256.
	GossipKeySize = 32
)

const (
	// alpn keeps others' TLS out, and will tell versions of the handshake apart.
	alpn = "sheepdog-peer/1"
	// serverName is in every certificate. A node's own name is the certificate's common
	// name, since not every name of a node is one for DNS.
	serverName = "peer.sheepdog.internal"

	saltKeys   = "sheepdog peer keys/1"
	infoGossip = "gossip"
	infoCA     = "certificate authority"
)

// Certificates are valid at any time a clock may show: no node may be shut out because
// its clock is wrong, and to end their validity early would gain nothing, since all that
// it takes for a new one is the secret. A node's key lives as long as its process.
var (
	validFrom  = time.Unix(0, 0).UTC()
	validUntil = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) // RFC 5280, 4.1.2.5: no end
)

// Credentials is what a cluster's secret gives a node. It prints as nothing.
type Credentials struct {
	gossip [GossipKeySize]byte
	key    ed25519.PrivateKey // of the CA
	ca     *x509.Certificate
	pool   *x509.CertPool
}

// NewCredentials derives a cluster's keys from its secret, white space around it
// ignored. The same secret gives the same keys on every node.
func NewCredentials(secret []byte) (*Credentials, error) {
	secret = bytes.TrimSpace(secret)
	switch {
	case len(secret) == 0:
		return nil, errors.New("secret is empty")
	case len(secret) < MinSecret:
		return nil, fmt.Errorf("secret of %d bytes is too short: at least %d are needed, and they should be random", len(secret), MinSecret)
	case len(secret) > MaxSecret:
		return nil, fmt.Errorf("secret is longer than %d bytes", MaxSecret)
	}
	c := new(Credentials)
	gossip, err := derive(secret, infoGossip, len(c.gossip))
	if err != nil {
		return nil, err
	}
	copy(c.gossip[:], gossip)
	seed, err := derive(secret, infoCA, ed25519.SeedSize)
	if err != nil {
		return nil, err
	}
	c.key = ed25519.NewKeyFromSeed(seed)
	if c.ca, err = authority(c.key); err != nil {
		return nil, fmt.Errorf("make CA certificate: %w", err)
	}
	c.pool = x509.NewCertPool()
	c.pool.AddCert(c.ca)
	return c, nil
}

func derive(secret []byte, info string, n int) ([]byte, error) {
	key, err := hkdf.Key(sha256.New, secret, []byte(saltKeys), info, n)
	if err != nil {
		return nil, fmt.Errorf("derive %s key: %w", info, err)
	}
	return key, nil
}

// authority makes the CA's certificate: byte for byte the same on every node.
func authority(key ed25519.PrivateKey) (*x509.Certificate, error) {
	id := sha256.Sum256(key.Public().(ed25519.PublicKey))
	t := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "sheepdog cluster"},
		NotBefore:             validFrom,
		NotAfter:              validUntil,
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
		SubjectKeyId:          id[:20],
		AuthorityKeyId:        id[:20],
	}
	der, err := x509.CreateCertificate(nil, t, t, key.Public(), key) // Ed25519 takes no randomness
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// LoadCredentials reads a secret from a file. It warns log of a file that others may read.
func LoadCredentials(path string, log *slog.Logger) (*Credentials, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read cluster secret: %w", err) // names the file
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o077 != 0 {
		log.Warn("file of cluster secret is accessible to others than its owner; make it mode 0600", "path", path, "mode", info.Mode().Perm().String())
	}
	secret, err := io.ReadAll(io.LimitReader(f, MaxSecret+1024))
	if err != nil {
		return nil, fmt.Errorf("read cluster secret: %w", err)
	}
	c, err := NewCredentials(secret)
	if err != nil {
		return nil, fmt.Errorf("cluster secret in %s: %w", path, err)
	}
	return c, nil
}

// GossipKey returns a copy of the key that encrypts gossip.
func (c *Credentials) GossipKey() []byte { return bytes.Clone(c.gossip[:]) }

// String keeps keys out of logs.
func (c *Credentials) String() string { return "cluster credentials" }

// GoString does so for %#v.
func (c *Credentials) GoString() string { return c.String() }

// LogValue does so for log/slog.
func (c *Credentials) LogValue() slog.Value { return slog.StringValue(c.String()) }

// Format does so for all other verbs.
func (c *Credentials) Format(f fmt.State, _ rune) { io.WriteString(f, c.String()) }

// issue makes a certificate for a node, with a new key.
func (c *Credentials) issue(name string) (tls.Certificate, error) {
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return tls.Certificate{}, err
	}
	t := &x509.Certificate{
		SerialNumber:          serial.Add(serial, big.NewInt(2)),
		Subject:               pkix.Name{CommonName: name},
		DNSNames:              []string{serverName},
		NotBefore:             validFrom,
		NotAfter:              validUntil,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, c.ca, pub, c.key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// tlsConfig is the TLS of a node, for both sides of a connection.
func (c *Credentials) tlsConfig(name string) (*tls.Config, error) {
	cert, err := c.issue(name)
	if err != nil {
		return nil, fmt.Errorf("issue certificate: %w", err)
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		NextProtos:   []string{alpn},
		Certificates: []tls.Certificate{cert},
		RootCAs:      c.pool,
		ClientCAs:    c.pool,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ServerName:   serverName,
		// A resumed session would save little on connections that live for days.
		SessionTicketsDisabled: true,
		// Else a connection's records are small at first and after each pause.
		DynamicRecordSizingDisabled: true,
	}, nil
}

// certifiedName is the name in the other side's certificate.
func certifiedName(s tls.ConnectionState) (string, error) {
	switch {
	case s.NegotiatedProtocol != alpn:
		return "", fmt.Errorf("other side does not speak %s", alpn)
	case len(s.VerifiedChains) == 0:
		return "", errors.New("other side has no certificate")
	}
	return s.PeerCertificates[0].Subject.CommonName, nil
}

// handshakeReason says in an operator's words why TLS failed.
func handshakeReason(err error) error {
	var unknown x509.UnknownAuthorityError
	var header tls.RecordHeaderError
	switch {
	case errors.As(err, &unknown), hasAlert(err, alertBadCertificate), hasAlert(err, alertUnknownCA):
		return fmt.Errorf("%w: %w", errOtherSecret, err)
	case errors.As(err, &header):
		return fmt.Errorf("%w: %w", errNotTLS, err)
	}
	return err
}

// hasAlert reports whether err is an alert that the other side has sent. Those that come during the
// handshake have a type of crypto/tls's own, but the same words; those behind it are of package record.
func hasAlert(err error, want tls.AlertError) bool {
	var got tls.AlertError
	var op *net.OpError
	return errors.As(err, &got) && got == want || errors.As(err, &op) && op.Op == "remote error" && op.Err.Error() == want.Error()
}

// RFC 8446, 6: what a side says to a certificate of another CA.
const (
	alertBadCertificate tls.AlertError = 42
	alertUnknownCA      tls.AlertError = 48
)

var (
	errOtherSecret = errors.New("other side has another cluster secret")
	errNotTLS      = errors.New("other side does not speak TLS")
)
