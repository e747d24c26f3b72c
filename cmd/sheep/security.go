package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"sheepdog/conf"
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
