package record

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"hash"

	"golang.org/x/crypto/chacha20poly1305"
)

// suite is a cipher suite: RFC 8446, B.4.
type suite struct {
	hash   func() hash.Hash
	secret int // length of its secrets, in bytes: its hash's
	key    int // length of its keys, in bytes
	aead   func(key []byte) (cipher.AEAD, error)
}

var suites = map[uint16]suite{
	tls.TLS_AES_128_GCM_SHA256:       {sha256.New, sha256.Size, 16, gcm},
	tls.TLS_AES_256_GCM_SHA384:       {sha512.New384, sha512.Size384, 32, gcm},
	tls.TLS_CHACHA20_POLY1305_SHA256: {sha256.New, sha256.Size, chacha20poly1305.KeySize, chacha20poly1305.New},
}

func gcm(key []byte) (cipher.AEAD, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(b)
}

// Lengths that all suites have in common, in bytes: RFC 8446, 5.3, and RFC 5116, 5.1.
const (
	nonceSize = 12
	tagSize   = 16
)

// keys protect one direction of a connection.
type keys struct {
	suite  suite
	secret []byte // the traffic secret: RFC 8446, 7.1
	aead   cipher.AEAD
	iv     [nonceSize]byte
	seq    uint64          // records under the present key
	nonce  [nonceSize]byte // of the present record; here because it would escape
}

// init begins with the first application traffic secret. secret is copied.
func (k *keys) init(id uint16, secret []byte) error {
	s, ok := suites[id]
	switch {
	case !ok:
		return fmt.Errorf("TLS cipher suite %s is not known here", tls.CipherSuiteName(id))
	case len(secret) != s.secret:
		return fmt.Errorf("TLS traffic secret has %d bytes instead of %d", len(secret), s.secret)
	}
	k.suite = s
	k.secret = append(make([]byte, 0, s.secret), secret...)
	return k.derive()
}

// derive makes key and iv from the secret: RFC 8446, 7.3.
func (k *keys) derive() error {
	key, err := k.expand("key", k.suite.key)
	if err != nil {
		return err
	}
	defer clear(key)
	iv, err := k.expand("iv", nonceSize)
	if err != nil {
		return err
	}
	defer clear(iv)
	if k.aead, err = k.suite.aead(key); err != nil {
		return fmt.Errorf("make TLS cipher: %w", err)
	}
	copy(k.iv[:], iv)
	k.seq = 0
	return nil
}

// update goes on to the next secret: RFC 8446, 7.2. Nothing leads back to the last one.
func (k *keys) update() error {
	next, err := k.expand("traffic upd", k.suite.secret)
	if err != nil {
		return err
	}
	clear(k.secret)
	k.secret = next
	return k.derive()
}

// expand is HKDF-Expand-Label with an empty context: RFC 8446, 7.1.
func (k *keys) expand(label string, n int) ([]byte, error) {
	const prefix = "tls13 "
	info := binary.BigEndian.AppendUint16(make([]byte, 0, 32), uint16(n))
	info = append(info, byte(len(prefix)+len(label)))
	info = append(append(info, prefix...), label...)
	info = append(info, 0)
	b, err := hkdf.Expand(k.suite.hash, k.secret, string(info), n)
	if err != nil {
		return nil, fmt.Errorf("derive TLS %s: %w", label, err)
	}
	return b, nil
}

// next is the nonce of the next record: RFC 8446, 5.3. seq comes nowhere near its end.
func (k *keys) next() []byte {
	k.nonce = k.iv
	tail := k.nonce[nonceSize-8:]
	binary.BigEndian.PutUint64(tail, binary.BigEndian.Uint64(tail)^k.seq)
	k.seq++
	return k.nonce[:]
}
