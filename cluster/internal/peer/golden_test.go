package peer

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"testing"
)

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What nodes of different builds have to agree on, byte for byte.
func TestGoldenFrames(t *testing.T) {
	for _, x := range []struct {
		what string
		h    header
		seed uint64
		hex  string
	}{
		{"request", header{typ: frameRequest, op: 0x102, id: 5<<slotBits | 7, data: 4096, want: 64, head: 48}, 0x1122334455667788, "534850460100020107000500000000000010000040000000300000002b2d5bf7"},
		{"reply", header{typ: frameReply, id: 5<<slotBits | 7, data: 64, head: 3}, 0x1122334455667788, "53485046020000000700050000000000400000000000000003000000788215b4"},
		{"failure", header{typ: frameReply, op: 4, id: 5<<slotBits | 7, head: 11}, 0x1122334455667788, "5348504602000400070005000000000000000000000000000b000000bdf0e82b"},
		{"ping", header{typ: framePing, id: 0x0102030405060708}, 0, "53485046030000000807060504030201000000000000000000000000c23f3deb"},
		{"pong", header{typ: framePong, id: 0x0102030405060708}, 0, "534850460400000008070605040302010000000000000000000000005c13f4c1"},
	} {
		var b [headerSize]byte
		x.h.encode(&b, x.seed)
		if got := hex.EncodeToString(b[:]); got != x.hex {
			t.Errorf("%s:\n got %s\nwant %s", x.what, got, x.hex)
			continue
		}
		if h, err := decodeHeader(unhex(t, x.hex), x.seed); err != nil || h != x.h {
			t.Errorf("%s: %+v, %v", x.what, h, err)
		}
		if _, err := decodeHeader(b[:], x.seed+1); err == nil {
			t.Errorf("%s of another connection is accepted", x.what)
		}
		for i := range b { // any change is noticed
			b[i] ^= 0x40
			if _, err := decodeHeader(b[:], x.seed); err == nil {
				t.Errorf("%s: change of byte %d is not noticed", x.what, i)
			}
			b[i] ^= 0x40
		}
	}
}

func TestGoldenHello(t *testing.T) {
	h := hello{
		version: helloVersion, kind: KindCommit, verdict: otherCluster, nonce: nonce{1, 2, 3, 15: 16},
		from: Identity{Cluster: "c1", Name: "n1", Node: 0x0304, Incarnation: 0x0506}, to: "n2", text: "why",
	}
	const want = "534850480100320003020102030000000000000000000000001004030605000000000000026331026e31026e3203007768799752d048c30990a7"
	b := h.encode()
	if got := hex.EncodeToString(b); got != want {
		t.Errorf("\n got %s\nwant %s", got, want)
	}
	got, err := readHello(bytes.NewReader(b))
	if err != nil || got != h {
		t.Errorf("%+v, %v", got, err)
	}
	for i := range b {
		b[i] ^= 0x40
		if got, err := readHello(bytes.NewReader(b)); err == nil && got == h {
			t.Errorf("change of byte %d is not noticed", i)
		}
		b[i] ^= 0x40
		if _, err := readHello(bytes.NewReader(b[:i])); err == nil {
			t.Errorf("%d bytes are enough", i)
		}
	}
	if s := seed(nonce{1}, nonce{2}); s != 0x6176572696214cb7 {
		t.Errorf("seed %#x", s)
	}
}

func TestGoldenKeys(t *testing.T) {
	c := credentials(t, " 0123456789abcdef\n")
	if got := hex.EncodeToString(c.GossipKey()); got != "40062d25337c51fb70b6e570002281a3a5d7d25fa61bba44c2e0d3db5373d9d1" {
		t.Errorf("gossip key %s", got)
	}
	sum := sha256.Sum256(c.ca.Raw)
	if got := hex.EncodeToString(sum[:]); got != "6d3801f61e39de0c8459a586606ded9ba451f22fc931c8e028a3861e21df7cba" {
		t.Errorf("CA certificate %s", got)
	}
}
