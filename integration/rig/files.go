package rig

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Random returns n bytes that depend only on the seed.
func Random(seed uint64, n int) []byte {
	b := make([]byte, n)
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	mathrand.NewChaCha8(key).Read(b)
	return b
}

// File writes a file into the test's directory and returns its path.
func File(t testing.TB, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// Tmpfs mounts a memory file system of so many bytes for the time of the test. It needs root, as CI and
// `make test` have it; a full disk cannot be made without.
func Tmpfs(t testing.TB, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatalf("mount a tmpfs of %s (the test needs root): %v", size, err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// Ext4 mounts an ext4 file system of a size on a loop device for the time of the test. It needs root.
func Ext4(t testing.TB, size string) string {
	t.Helper()
	image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
	OK(t, "truncate", "-s", size, image)
	OK(t, "mkfs.ext4", "-q", "-m", "0", image)
	OK(t, "mount", "-o", "loop", image, dir)
	if err := os.Remove(filepath.Join(dir, "lost+found")); err != nil {
		t.Error(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// ObjectUsage is the space that the object files of a sheep's disk occupy, in bytes; the log is not counted.
func ObjectUsage(t testing.TB, disk string) int64 {
	t.Helper()
	return DiskUsage(t, filepath.Join(disk, "objects")) + DiskUsage(t, filepath.Join(disk, "new"))
}

// DiskUsage returns the bytes that the files below a directory take on disk (not their lengths).
func DiskUsage(t testing.TB, dir string) int64 {
	t.Helper()
	var total int64
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			if os.IsNotExist(err) { // a file that went meanwhile
				return nil
			}
			return err
		}
		var st syscall.Stat_t
		if syscall.Lstat(path, &st) == nil {
			total += st.Blocks * 512
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return total
}

// Certificates makes a CA, a server's and a client's certificate in a directory, under the names that
// GnuTLS-based NBD clients look for: ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem,
// client-key.pem.
func Certificates(t testing.TB, address string) string {
	t.Helper()
	dir := t.TempDir()
	caKey, ca := issue(t, dir, "ca", "", nil, nil)
	issue(t, dir, "server", address, ca, caKey)
	issue(t, dir, "client", "", ca, caKey)
	return dir
}

func issue(t testing.TB, dir, name, address string, ca *x509.Certificate, caKey *ecdsa.PrivateKey) (*ecdsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: "sheepdog test " + name},
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if address != "" {
		template.IPAddresses = []net.IP{net.ParseIP(address)}
		template.DNSNames = []string{"localhost"}
	}
	if ca == nil {
		template.IsCA, template.BasicConstraintsValid = true, true
		template.KeyUsage |= x509.KeyUsageCertSign
		template.ExtKeyUsage = nil
		ca, caKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, &key.PublicKey, caKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write := func(suffix, kind string, der []byte) {
		b := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
		if err := os.WriteFile(filepath.Join(dir, name+suffix), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("-cert.pem", "CERTIFICATE", der)
	write("-key.pem", "PRIVATE KEY", pkcs8)
	return key, cert
}

// Lines splits text into its lines without empty ones.
func Lines(text string) []string {
	return strings.FieldsFunc(text, func(r rune) bool { return r == '\n' })
}

// ImageSum is the SHA-256 of all that is behind a URL that QEMU knows.
func ImageSum(t testing.TB, url string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	OK(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", url, path)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(b))
}
