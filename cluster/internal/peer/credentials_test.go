package peer

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestSecrets(t *testing.T) {
	for _, x := range []struct{ secret, want string }{
		{"", "empty"}, {" \n\t", "empty"}, {"  fifteen bytes..  ", "too short"}, {strings.Repeat("x", MaxSecret+1), "longer"},
	} {
		if _, err := NewCredentials([]byte(x.secret)); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%.20q: %v", x.secret, err)
		}
	}
	a, b := credentials(t, "\tsixteen bytes...\r\n"), credentials(t, "sixteen bytes...")
	if !bytes.Equal(a.ca.Raw, b.ca.Raw) || !bytes.Equal(a.GossipKey(), b.GossipKey()) {
		t.Error("white space around a secret matters")
	}
	other := credentials(t, "sixteen bytes..!")
	if bytes.Equal(a.ca.Raw, other.ca.Raw) || bytes.Equal(a.GossipKey(), other.GossipKey()) {
		t.Error("another secret gives the same")
	}
}

// Certificates hold whatever a node's clock shows, for their own cluster alone.
func TestCertificates(t *testing.T) {
	c, other := credentials(t, testSecret), credentials(t, testSecret+"!")
	issued, err := c.issue("node with a name, ü")
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(issued.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	if leaf.Subject.CommonName != "node with a name, ü" || leaf.IsCA {
		t.Errorf("%v", leaf.Subject)
	}
	for _, at := range []time.Time{time.Unix(1, 0), time.Now(), time.Now().AddDate(200, 0, 0)} {
		for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
			o := x509.VerifyOptions{DNSName: serverName, Roots: c.pool, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{use}}
			if _, err := leaf.Verify(o); err != nil {
				t.Errorf("%v: %v", at, err)
			}
			if o.Roots = other.pool; o.Roots != nil {
				if _, err := leaf.Verify(o); err == nil {
					t.Error("another cluster believes it")
				}
			}
		}
	}
}

func TestSecretFiles(t *testing.T) {
	dir := t.TempDir()
	log := new(lines)
	logger := slog.New(slog.NewTextHandler(log, nil))
	file := func(content string, mode os.FileMode) string {
		path := filepath.Join(dir, "secret")
		os.Remove(path)
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if _, err := LoadCredentials(file(testSecret, 0o600), logger); err != nil || log.count() != 0 {
		t.Errorf("%v, %s", err, log)
	}
	if _, err := LoadCredentials(file(testSecret, 0o640), logger); err != nil || log.count() != 1 || !strings.Contains(log.String(), "0600") {
		t.Errorf("%v, %s", err, log)
	}
	if _, err := LoadCredentials(file("short", 0o600), logger); err == nil || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "too short") {
		t.Errorf("%v", err)
	}
	if _, err := LoadCredentials(filepath.Join(dir, "none"), logger); err == nil || !os.IsNotExist(err) && !strings.Contains(err.Error(), "no such file") {
		t.Errorf("%v", err)
	}
	if _, err := LoadCredentials(file(strings.Repeat("x", 1<<20), 0o600), logger); err == nil {
		t.Error("a megabyte is a secret")
	}
}

// Nothing prints a key.
func TestCredentialsAreSilent(t *testing.T) {
	c := credentials(t, testSecret)
	log := new(lines)
	slog.New(slog.NewJSONHandler(log, nil)).Info("x", "c", c, "d", *c, "e", Config{Credentials: c})
	all := log.String() + fmt.Sprintf("%v %+v %#v %s %x %q %d %v %+v", c, c, c, c, c, c, c, Config{Credentials: c}, Config{Credentials: c})
	key := c.GossipKey()
	for _, s := range []string{testSecret, hex.EncodeToString(key[:8]), hex.EncodeToString(c.key[:8]), fmt.Sprint(key[:4])[1:8], "PrivateKey"} {
		if strings.Contains(all, s) {
			t.Errorf("%q is printed: %s", s, all)
		}
	}
}
