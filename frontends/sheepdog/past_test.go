package sheepdog

import (
	"context"
	"fmt"
	"testing"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi"
)

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for until := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal(what)
		}
	}
}

// heldVolumes has changes wait, and asked about then, as if another node owned the VDI until then.
type heldVolumes struct {
	volumes
	gate chan struct{}
}

func (v heldVolumes) OpenVID(vid object.VID, client string, quiet bool) (Volume, error) {
	vol, err := v.volumes.OpenVID(vid, client, quiet)
	return heldVolume{vol, v.gate}, err
}

type heldVolume struct {
	Volume
	gate chan struct{}
}

func (v heldVolume) Submit(r *vdi.Request) {
	if r.Op == vdi.OpRead {
		v.Volume.Submit(r)
		return
	}
	go func() {
		<-v.gate
		if r.Check != nil {
			if r.Err = r.Check(r); r.Err != nil {
				r.Done(r)
				return
			}
		}
		v.Volume.Submit(r)
		v.Kick()
	}()
}

// What a client that has left had in flight is not carried out when this node becomes the VDI's owner later: it has sent that anew
// on another connection.
func TestWritesOfThePast(t *testing.T) {
	h := serve(t, nil)
	v := h.create("vm", 4<<20)
	gate := make(chan struct{})
	h.start(func(c *Config) { c.Volumes = heldVolumes{h.volumes, gate} })
	conn := h.dial()
	if _, err := conn.Write(message(t, []string{"op=1", "flags=1", fmt.Sprintf("oid=%d", uint64(v.VID)<<32), "fill=7*4096"})); err != nil {
		t.Fatal(err)
	}
	session := func() (n int, inFlight int64, gone bool) {
		h.server.clients.Each(func(s *session) { n, inFlight, gone = n+1, s.stream.InFlight(), s.ctx.Err() != nil })
		return n, inFlight, gone
	}
	eventually(t, "nothing is in flight", func() bool { _, n, _ := session(); return n == 1 })
	conn.Close()
	eventually(t, "the session does not notice", func() bool { _, _, gone := session(); return gone })
	close(gate)
	eventually(t, "the session is left", func() bool { n, _, _ := session(); return n == 0 })
	vol, err := h.volumes.Open(context.Background(), "vm", "", vdi.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer vol.Close()
	b := make([]byte, 1)
	if _, err := vol.ReadAt(context.Background(), b, 0); err != nil || b[0] != 0 {
		t.Errorf("what is of the past has landed: %d %v", b[0], err)
	}
}
