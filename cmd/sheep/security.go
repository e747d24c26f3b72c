package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"sheepdog/conf"
	"sheepdog/frontends/iscsi/access"
)

// serverTLS loads certificates; nil if there are none. key names the section for errors.
func serverTLS(key string, t conf.TLS) (*tls.Config, error) {
	if !t.Enabled() {
		return nil, nil
	}
	cert, err := tls.LoadX509KeyPair(t.Cert, t.Key)
	if err != nil {
		return nil, fmt.Errorf("%s.cert and %s.key: %w", key, key, err)
	}
	c := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	if t.ClientCA == "" {
		return c, nil
	}
	pem, err := os.ReadFile(t.ClientCA)
	if err != nil {
		return nil, fmt.Errorf("%s.client_ca: %w", key, err)
	}
	c.ClientCAs, c.ClientAuth = x509.NewCertPool(), tls.RequireAndVerifyClientCert
	if !c.ClientCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s.client_ca: %s has no certificate in PEM format", key, t.ClientCA)
	}
	return c, nil
}

func prefixes(key string, list []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range list {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
		out = append(out, p)
	}
	return out, nil
}

// chapSecret bounds a secret of CHAP, in bytes: shorter ones can be guessed from what goes
// over the wire (RFC 7143 section 9.2.1 wants 96 bits), longer ones no initiator takes.
const (
	minChapSecret = 12
	maxChapSecret = 255
)

func readChapSecret(key, file string) (string, error) {
	if file == "" {
		return "", nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("%s: %w", key, err)
	}
	secret := strings.TrimSpace(string(b))
	if len(secret) < minChapSecret || len(secret) > maxChapSecret || strings.ContainsAny(secret, " \t\r\n") {
		return "", fmt.Errorf("%s: %s must have one word of %d to %d letters: try openssl rand -hex 8", key, file, minChapSecret, maxChapSecret)
	}
	return secret, nil
}

// readSecret reads what is behind a credential: one word, the secret, whose name is the file's; or two, name and
// secret.
func readSecret(dir, credential string) (user, secret string, err error) {
	if dir == "" {
		return "", "", errors.New("iscsi.secrets names no directory on this gateway")
	}
	if err := access.CheckCredential(credential); err != nil { // it must not lead out of the directory
		return "", "", err
	}
	b, err := os.ReadFile(filepath.Join(dir, credential))
	if err != nil {
		return "", "", err
	}
	words := strings.Fields(string(b))
	if len(words) == 1 {
		words = []string{credential, words[0]}
	}
	if len(words) != 2 || len(words[1]) < minChapSecret || len(words[1]) > maxChapSecret {
		return "", "", fmt.Errorf("%s must have one word of %d to %d letters, or CHAP's name before it", filepath.Join(dir, credential), minChapSecret, maxChapSecret)
	}
	return words[0], words[1], nil
}

func chapSecrets(dir string) func(string) (string, string, error) {
	return func(credential string) (string, string, error) { return readSecret(dir, credential) }
}

// minToken is the shortest token that is worth its name, in bytes.
const minToken = 16

func readToken(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("admin.token_file: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if len(token) < minToken || strings.ContainsAny(token, " \t\r\n") {
		return "", fmt.Errorf("admin.token_file: %s must have one word of at least %d letters: try openssl rand -hex 32", file, minToken)
	}
	return token, nil
}

// addrOf is an address as netip has it; the zero one if it is none.
func addrOf(host string) netip.Addr {
	a, _ := netip.ParseAddr(host)
	return a
}
