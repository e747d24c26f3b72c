package login

import (
	"testing"

	"sheepdog/frontends/iscsi/internal/pdu"
)

func testConfig(secret string) Config {
	return Config{
		Auth:      func(string, string) Auth { return Auth{User: "u", Secret: secret, OurUser: "t", OurSecret: secret} },
		Admit:     func(_, target string) pdu.LoginStatus { return pdu.LoginOK },
		Challenge: [ChallengeSize]byte{1, 2, 3}, ChallengeID: 9, PortalGroup: 1,
	}
}

// Whatever comes, a login with a secret is not over before it was proven.
func FuzzLogin(f *testing.F) {
	f.Add([]byte("InitiatorName=iqn.a\x00TargetName=iqn.b\x00AuthMethod=CHAP\x00"), []byte("CHAP_A=5\x00"), []byte("CHAP_N=u\x00CHAP_R=0x00\x00"), byte(0x81), byte(0x01), byte(0x87))
	f.Add([]byte("InitiatorName=iqn.a\x00SessionType=Discovery\x00"), []byte("HeaderDigest=CRC32C\x00"), []byte("MaxBurstLength=1\x00"), byte(0x87), byte(0x87), byte(0x87))
	f.Fuzz(func(t *testing.T, a, b, c []byte, fa, fb, fc byte) {
		for _, secret := range []string{"", "a secret of some length"} {
			m := New(testConfig(secret))
			for i, data := range [][]byte{a, b, c} {
				var h pdu.Header
				h[0], h[1] = 0x43, []byte{fa, fb, fc}[i]
				r := m.Step(&h, data)
				if r.Status != pdu.LoginOK {
					break
				}
				if r.Done {
					if secret != "" && m.Params().User == "" {
						t.Fatalf("logged in without the secret: %q %q %q", a, b, c)
					}
					if p := m.Params(); p.MaxBurst < 512 || p.FirstBurst > p.MaxBurst || p.MaxSend < 512 || p.MaxR2T < 1 {
						t.Fatalf("%+v", p)
					}
					break
				}
			}
		}
	})
}

// Who sends our own challenge back gets no answer to it.
func TestReflection(t *testing.T) {
	m := New(testConfig("a secret of some length"))
	step := func(flags byte, text string) Reply {
		var h pdu.Header
		h[0], h[1] = 0x43, flags
		return m.Step(&h, []byte(text))
	}
	step(0x01, "InitiatorName=iqn.a\x00TargetName=iqn.b\x00AuthMethod=CHAP\x00")
	step(0x01, "CHAP_A=5\x00")
	proof := chapResponse(9, "a secret of some length", m.cfg.Challenge[:])
	hex := "0x"
	for _, b := range proof {
		hex += string("0123456789abcdef"[b>>4]) + string("0123456789abcdef"[b&15])
	}
	r := step(0x81, "CHAP_N=u\x00CHAP_R="+hex+"\x00CHAP_I=9\x00CHAP_C=0x01020300000000000000000000000000\x00")
	if r.Status != pdu.LoginAuthentication {
		t.Errorf("status %#x", uint16(r.Status))
	}
}
