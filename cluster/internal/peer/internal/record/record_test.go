package record

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// pair is the two ends of one direction.
func pair(t testing.TB, suite uint16, limit uint64) (*Sealer, *Opener) {
	t.Helper()
	secret := bytes.Repeat([]byte{7}, suites[suite].secret)
	s, err := NewSealer(suite, secret, limit)
	if err != nil {
		t.Fatal(err)
	}
	o, err := NewOpener(suite, secret, limit)
	if err != nil {
		t.Fatal(err)
	}
	return s, o
}

// The example of RFC 8448, section 3: keys, and all records behind the handshake.
func TestRFC8448(t *testing.T) {
	data := make([]byte, 50)
	for i := range data {
		data[i] = byte(i)
	}
	for _, side := range []struct {
		name, secret, key, iv string
		skip                  uint64 // a NewSessionTicket, which is not for us
		data, alert           string
	}{
		{
			"client", "9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5",
			"17422dda596ed5d9acd890e3c63f5051", "5b78923dee08579033e523d9", 0,
			`17 03 03 00 43 a2 3f 70 54 b6 2c 94 d0 af fa fe 82 28 ba 55 cb ef ac ea 42 f9 14 aa 66 bc ab 3f 2b 98 19 a8 a5 b4 6b
			39 5b d5 4a 9a 20 44 1e 2b 62 97 4e 1f 5a 62 92 a2 97 70 14 bd 1e 3d ea e6 3a ee bb 21 69 49 15 e4`,
			"17 03 03 00 13 c9 87 27 60 65 56 66 b7 4d 7f f1 15 3e fd 6d b6 d0 b0 e3",
		},
		{
			"server", "a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643",
			"9f02283b6c9c07efc26bb9f2ac92e356", "cf782b88dd83549aadf1e984", 1,
			`17 03 03 00 43 2e 93 7e 11 ef 4a c7 40 e5 38 ad 36 00 5f c4 a4 69 32 fc 32 25 d0 5f 82 aa 1b 36 e3 0e fa f9 7d 90 e6
			df fc 60 2d cb 50 1a 59 a8 fc c4 9c 4b f2 e5 f0 a2 1c 00 47 c2 ab f3 32 54 0d d0 32 e1 67 c2 95 5d`,
			"17 03 03 00 13 b5 8f d6 71 66 eb f5 99 d2 47 20 cf be 7e fa 7a 88 64 a9",
		},
	} {
		t.Run(side.name, func(t *testing.T) {
			secret := unhex(t, side.secret)
			o, err := NewOpener(tls.TLS_AES_128_GCM_SHA256, secret, MaxRecords)
			if err != nil {
				t.Fatal(err)
			}
			if key, err := o.keys.expand("key", 16); err != nil || !bytes.Equal(key, unhex(t, side.key)) {
				t.Errorf("key %x, %v", key, err)
			}
			if !bytes.Equal(o.keys.iv[:], unhex(t, side.iv)) {
				t.Errorf("iv %x", o.keys.iv)
			}
			s, err := NewSealer(tls.TLS_AES_128_GCM_SHA256, secret, MaxRecords)
			if err != nil {
				t.Fatal(err)
			}
			clear(secret) // both have a copy
			o.keys.seq, s.keys.seq = side.skip, side.skip

			want := unhex(t, side.data)
			b := make([]byte, MaxSize)
			copy(b[HeaderSize:], data)
			if n := s.Seal(b, len(data)); !bytes.Equal(b[:n], want) {
				t.Errorf("sealed %x", b[:n])
			}
			if n, _, err := o.Open(b, want); err != nil || !bytes.Equal(b[:n], data) {
				t.Errorf("opened %x, %v", b[:n], err)
			}
			want = unhex(t, side.alert)
			copy(b[HeaderSize:], []byte{1, byte(alertCloseNotify)})
			if n := s.seal(b, 2, typeAlert); !bytes.Equal(b[:n], want) {
				t.Errorf("sealed %x", b[:n])
			}
			if n, _, err := o.Open(b, want); n != 0 || err != io.EOF {
				t.Errorf("%v", err)
			}
		})
	}
}

// eachSuite runs a test with each of the suites.
func eachSuite(t *testing.T, f func(t *testing.T, suite uint16)) {
	for id := range suites {
		t.Run(tls.CipherSuiteName(id), func(t *testing.T) { f(t, id) })
	}
}

// What is sealed is opened, where it is and elsewhere, under ever new keys.
func TestSealAndOpen(t *testing.T) {
	eachSuite(t, func(t *testing.T, suite uint16) {
		s, o := pair(t, suite, 5)
		r := rand.New(rand.NewPCG(1, uint64(suite)))
		b, dst := make([]byte, MaxSize), make([]byte, MaxContent+1)
		updates := 0
		for range 300 {
			if s.Due() {
				n, err := s.KeyUpdate(b, updates%2 == 0)
				if err != nil || n != KeyUpdateSize {
					t.Fatal(n, err)
				}
				if n, asked, err := o.Open(dst, b[:n]); n != 0 || asked != (updates%2 == 0) || err != nil {
					t.Fatal(n, asked, err)
				}
				updates++
			}
			content := make([]byte, 1+r.IntN(MaxContent)>>r.IntN(15))
			for i := range content {
				content[i] = byte(r.Uint32())
			}
			content[len(content)-1] = 0 // not padding
			copy(b[HeaderSize:], content)
			size := s.Seal(b, len(content))
			if n, err := Size(b); n != size || err != nil || Room(n) != len(content)+1 {
				t.Fatal(n, err)
			}
			to := dst[:Room(size)]
			if r.IntN(2) == 0 {
				to = b[HeaderSize:]
			}
			if n, _, err := o.Open(to, b[:size]); err != nil || !bytes.Equal(to[:n], content) {
				t.Fatalf("%d bytes come back as %d, %v", len(content), n, err)
			}
			if s.keys.seq > s.limit || o.Overdue() {
				t.Fatalf("%d records under a key", s.keys.seq)
			}
		}
		if updates != 300/4-1 {
			t.Errorf("%d updates", updates)
		}
	})
}

// RFC 8446, 7.2: the secret goes, all else begins anew.
func TestUpdateLeavesNothing(t *testing.T) {
	s, _ := pair(t, tls.TLS_AES_256_GCM_SHA384, MaxRecords)
	first, iv := s.keys.secret, s.keys.iv
	if _, err := s.KeyUpdate(make([]byte, KeyUpdateSize), false); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, make([]byte, len(first))) || s.keys.iv == iv || s.keys.seq != 0 || bytes.Equal(s.keys.secret, first) {
		t.Error("something of the old key is left")
	}
}

func TestOverdue(t *testing.T) {
	s, o := pair(t, tls.TLS_AES_128_GCM_SHA256, 10)
	overdue := 0
	b := make([]byte, 100)
	for range 30 {
		if _, _, err := o.Open(b[HeaderSize:], b[:s.Seal(b, 1)]); err != nil {
			t.Fatal(err)
		}
		if o.Overdue() {
			overdue++
		}
	}
	if overdue != 3 {
		t.Errorf("%d times", overdue)
	}
}

func TestUnknownSuite(t *testing.T) {
	if _, err := NewSealer(tls.TLS_RSA_WITH_AES_128_GCM_SHA256, make([]byte, 32), MaxRecords); err == nil || !strings.Contains(err.Error(), "TLS_RSA_WITH_AES_128_GCM_SHA256") {
		t.Error(err)
	}
	if _, err := NewOpener(tls.TLS_AES_128_GCM_SHA256, make([]byte, 48), MaxRecords); err == nil {
		t.Error("a secret of a wrong length is taken")
	}
}

// sealed is a record of any inner plaintext: content, type, padding.
func sealed(s *Sealer, inner []byte) []byte {
	b := make([]byte, HeaderSize, HeaderSize+len(inner)+tagSize)
	n := len(inner) + tagSize
	b[0], b[1], b[2], b[3], b[4] = typeData, 3, 3, byte(n>>8), byte(n)
	return s.keys.aead.Seal(b, s.keys.next(), inner, b)
}

func inner(typ byte, padding int, content ...byte) []byte {
	return append(append(bytes.Clone(content), typ), make([]byte, padding)...)
}

// What may come after the handshake, and what follows from it.
func TestWhatMayCome(t *testing.T) {
	data := inner(typeData, 0, 'x')
	update := inner(typeHandshake, 0, messageKeyUpdate, 0, 0, 1, updateNotAsked)
	for _, c := range []struct {
		name   string
		inner  [][]byte
		data   string // of all
		asked  bool
		closed error
		alert  tls.AlertError // 0: none
	}{
		{name: "data", inner: [][]byte{data, data}, data: "xx"},
		{name: "padding", inner: [][]byte{inner(typeData, 100, 'x', 0, 'y', 0)}, data: "x\x00y\x00"},
		{name: "most padding", inner: [][]byte{inner(typeData, MaxContent-1, 'x'), data}, data: "xx"},
		{name: "too much padding", inner: [][]byte{inner(typeData, MaxContent, 'x')}, alert: alertRecordOverflow},
		{name: "longest", inner: [][]byte{inner(typeData, 0, bytes.Repeat([]byte{'x'}, MaxContent)...)}, data: strings.Repeat("x", MaxContent)},
		{name: "too long", inner: [][]byte{inner(typeData, 0, make([]byte, MaxContent+1)...)}, alert: alertRecordOverflow},
		{name: "no data", inner: [][]byte{inner(typeData, 0), inner(typeData, 9), data}, data: "x"},
		{name: "no data for ever", inner: times(inner(typeData, 0), maxUseless+1), alert: alertUnexpectedMessage},
		{name: "no type", inner: [][]byte{make([]byte, 1)}, alert: alertUnexpectedMessage},
		{name: "nothing but padding", inner: [][]byte{make([]byte, 1000)}, alert: alertUnexpectedMessage},
		{name: "close_notify", inner: [][]byte{data, inner(typeAlert, 0, 1, byte(alertCloseNotify))}, data: "x", closed: io.EOF},
		{name: "close_notify, padded", inner: [][]byte{inner(typeAlert, 5, 1, byte(alertCloseNotify))}, closed: io.EOF},
		{name: "user_canceled", inner: [][]byte{inner(typeAlert, 0, 1, byte(alertUserCanceled)), data}, data: "x"},
		{name: "warnings for ever", inner: times(inner(typeAlert, 0, 1, byte(alertUserCanceled)), maxUseless+1), alert: alertUnexpectedMessage},
		{name: "fatal alert", inner: [][]byte{inner(typeAlert, 0, 2, byte(alertBadRecordMAC))}, closed: alertBadRecordMAC},
		{name: "fatal alert called a warning", inner: [][]byte{inner(typeAlert, 0, 1, 42)}, closed: tls.AlertError(42)},
		{name: "short alert", inner: [][]byte{inner(typeAlert, 0, 2)}, alert: alertDecodeError},
		{name: "empty alert", inner: [][]byte{inner(typeAlert, 0)}, alert: alertDecodeError},
		{name: "two alerts", inner: [][]byte{inner(typeAlert, 0, 1, 90, 1, 0)}, alert: alertDecodeError},
		{name: "KeyUpdate", inner: [][]byte{data, update, data}, data: "xx"},
		{name: "KeyUpdate that asks", inner: [][]byte{inner(typeHandshake, 3, messageKeyUpdate, 0, 0, 1, updateAsked), data}, data: "x", asked: true},
		{name: "KeyUpdate in pieces", inner: [][]byte{inner(typeHandshake, 0, messageKeyUpdate, 0), inner(typeHandshake, 0, 0, 1), inner(typeHandshake, 0, updateNotAsked), data}, data: "x"},
		{name: "KeyUpdate for ever", inner: times(update, maxUseless+1), alert: alertUnexpectedMessage},
		{name: "data within a KeyUpdate", inner: [][]byte{inner(typeHandshake, 0, messageKeyUpdate, 0), data}, alert: alertUnexpectedMessage},
		{name: "alert within a KeyUpdate", inner: [][]byte{inner(typeHandshake, 0, messageKeyUpdate, 0), inner(typeAlert, 0, 1, 0)}, alert: alertUnexpectedMessage},
		{name: "two KeyUpdates in a record", inner: [][]byte{append(update[:5:5], update...)}, alert: alertUnexpectedMessage},
		{name: "KeyUpdate that asks for something else", inner: [][]byte{inner(typeHandshake, 0, messageKeyUpdate, 0, 0, 1, 2)}, alert: alertIllegalParameter},
		{name: "long KeyUpdate", inner: [][]byte{inner(typeHandshake, 0, messageKeyUpdate, 0, 0, 2, 0, 0)}, alert: alertDecodeError},
		{name: "huge KeyUpdate", inner: [][]byte{inner(typeHandshake, 0, messageKeyUpdate, 255, 255, 255)}, alert: alertDecodeError},
		{name: "empty KeyUpdate", inner: [][]byte{inner(typeHandshake, 0, messageKeyUpdate, 0, 0, 0)}, alert: alertDecodeError},
		{name: "empty piece of a message", inner: [][]byte{inner(typeHandshake, 0)}, alert: alertUnexpectedMessage},
		{name: "NewSessionTicket", inner: [][]byte{inner(typeHandshake, 0, 4, 0, 0, 10)}, alert: alertUnexpectedMessage}, // 4.2.9: not to who offers no PSK modes
		{name: "CertificateRequest", inner: [][]byte{inner(typeHandshake, 0, 13, 0, 0, 10)}, alert: alertUnexpectedMessage},
		{name: "ClientHello", inner: [][]byte{inner(typeHandshake, 0, 1, 0, 0, 10)}, alert: alertUnexpectedMessage},
		{name: "change_cipher_spec", inner: [][]byte{inner(20, 0, 1)}, alert: alertUnexpectedMessage},
		{name: "unknown type", inner: [][]byte{inner(99, 0, 1)}, alert: alertUnexpectedMessage},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, o := pair(t, tls.TLS_AES_128_GCM_SHA256, MaxRecords)
			var got []byte
			var any bool
			var failed error
			for i, in := range c.inner {
				r := sealed(s, in)
				size, err := Size(r)
				if err == nil {
					var n int
					var asked bool
					n, asked, err = o.Open(r[HeaderSize:], r[:size])
					got = append(got, r[HeaderSize:][:n]...)
					any = any || asked
				}
				if in[0] == messageKeyUpdate && len(in) >= 5 || i == 2 && c.name == "KeyUpdate in pieces" {
					s.keys.update()
				}
				if failed = err; err != nil {
					if i != len(c.inner)-1 {
						t.Fatalf("record %d: %v", i, err)
					}
				}
			}
			if string(got) != c.data || any != c.asked {
				t.Errorf("%d bytes, asked: %v", len(got), any)
			}
			switch {
			case c.alert != 0:
				if !errors.Is(failed, ErrRefused) || !errors.Is(failed, c.alert) {
					t.Errorf("%v instead of %v", failed, c.alert)
				}
			case !errors.Is(failed, c.closed) || errors.Is(failed, ErrRefused):
				t.Errorf("%v instead of %v", failed, c.closed)
			}
		})
	}
}

func times(p []byte, n int) (list [][]byte) {
	for range n {
		list = append(list, p)
	}
	return list
}

// A record is opened once, in its place, and only as it was made.
func TestForgeries(t *testing.T) {
	eachSuite(t, func(t *testing.T, suite uint16) {
		for _, c := range []struct {
			name string
			do   func(a, b []byte) []byte // of the first and the second record: what comes first
		}{
			{"later record", func(a, b []byte) []byte { return b }},
			{"flipped bit of the tag", func(a, b []byte) []byte { a[len(a)-1] ^= 1; return a }},
			{"flipped bit of the content", func(a, b []byte) []byte { a[HeaderSize] ^= 128; return a }},
			{"other version", func(a, b []byte) []byte { a[2] = 4; return a }},
			{"shorter", func(a, b []byte) []byte { a[4]--; return a[:len(a)-1] }},
			{"longer", func(a, b []byte) []byte { a[4]++; return append(a, 0) }},
			{"nothing but a tag's length", func(a, b []byte) []byte { a[3], a[4] = 0, overhead; return a[:HeaderSize+overhead] }},
		} {
			s, o := pair(t, suite, MaxRecords)
			a, b := sealed(s, inner(typeData, 0, 1, 2, 3)), sealed(s, inner(typeData, 0, 4, 5, 6))
			r := c.do(a, b)
			size, err := Size(r)
			if err != nil || size != len(r) {
				t.Fatalf("%s: %d, %v", c.name, size, err)
			}
			dst := make([]byte, 100)
			if n, _, err := o.Open(dst, r); n != 0 || !errors.Is(err, ErrRefused) || !errors.Is(err, alertBadRecordMAC) {
				t.Errorf("%s: %v", c.name, err)
			}
			if !bytes.Equal(dst, make([]byte, len(dst))) {
				t.Errorf("%s: %x came out", c.name, dst)
			}
		}
		s, o := pair(t, suite, MaxRecords)
		a := sealed(s, inner(typeData, 0, 1, 2, 3))
		if _, _, err := o.Open(make([]byte, 100), a); err != nil {
			t.Fatal(err)
		}
		if _, _, err := o.Open(make([]byte, 100), a); !errors.Is(err, alertBadRecordMAC) {
			t.Errorf("again: %v", err)
		}
	})
}

func TestHeaders(t *testing.T) {
	for _, c := range []struct {
		header []byte
		size   int
		alert  tls.AlertError
	}{
		{[]byte{23, 3, 3, 0, 17}, 22, 0},
		{[]byte{23, 9, 9, 0, 17}, 22, 0}, // RFC 8446, 5.1: MUST be ignored for all purposes; it is authenticated
		{[]byte{23, 3, 3, 0x41, 0}, HeaderSize + 1<<14 + 256, 0},
		{[]byte{23, 3, 3, 0x41, 1}, 0, alertRecordOverflow},
		{[]byte{23, 3, 3, 0xff, 0xff}, 0, alertRecordOverflow},
		{[]byte{23, 3, 3, 0, 16}, 0, alertDecodeError},
		{[]byte{23, 3, 3, 0, 0}, 0, alertDecodeError},
		{[]byte{20, 3, 3, 0, 1}, 0, alertUnexpectedMessage},
		{[]byte{21, 3, 3, 0, 2}, 0, alertUnexpectedMessage},
		{[]byte{22, 3, 3, 0, 5}, 0, alertUnexpectedMessage},
		{[]byte("GET /"), 0, alertUnexpectedMessage},
	} {
		n, err := Size(c.header)
		if n != c.size || (err != nil) != (c.alert != 0) || err != nil && (!errors.Is(err, c.alert) || !errors.Is(err, ErrRefused)) {
			t.Errorf("%x: %d, %v", c.header, n, err)
		}
	}
}

// FuzzOpen opens what nobody has the key for, and what a hostile node seals that has it.
func FuzzOpen(f *testing.F) {
	f.Add([]byte{23, 3, 3, 0, 17, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17}, false)
	f.Add(inner(typeData, 3, 1, 2), true)
	f.Add(inner(typeAlert, 0, 2, 20), true)
	f.Add(inner(typeHandshake, 0, messageKeyUpdate, 0, 0, 1, 1), true)
	f.Add(inner(typeHandshake, 0, messageKeyUpdate, 0), true)
	f.Fuzz(func(t *testing.T, p []byte, key bool) {
		s, o := pair(t, tls.TLS_CHACHA20_POLY1305_SHA256, MaxRecords)
		if key {
			if len(p)+tagSize > 1<<16-1 {
				return
			}
			p = sealed(s, p)
		}
		if len(p) < HeaderSize {
			return
		}
		size, err := Size(p)
		if err != nil {
			if !errors.Is(err, ErrRefused) {
				t.Errorf("%v", err)
			}
			return
		}
		if size < HeaderSize+overhead || size > HeaderSize+maxProtected {
			t.Fatalf("size %d", size)
		}
		if size > len(p) {
			return
		}
		const fill = 0xa5
		dst := bytes.Repeat([]byte{fill}, Room(size)+10)
		n, asked, err := o.Open(dst[:Room(size)], p[:size])
		if n > 0 && (err != nil || asked || !key || n > MaxContent) || err == nil && !key {
			t.Errorf("%d bytes, asked: %v, %v", n, asked, err)
		}
		if !bytes.Equal(dst[Room(size):], bytes.Repeat([]byte{fill}, 10)) {
			t.Error("written behind the room")
		}
	})
}

func BenchmarkRecords(b *testing.B) {
	for id := range suites {
		s, o := pair(b, id, MaxRecords)
		b.Run(tls.CipherSuiteName(id), func(b *testing.B) {
			r := make([]byte, MaxSize)
			dst := make([]byte, MaxContent+1)
			b.SetBytes(MaxContent)
			b.ReportAllocs()
			for b.Loop() {
				n := s.Seal(r, MaxContent)
				if _, _, err := o.Open(dst, r[:n]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
