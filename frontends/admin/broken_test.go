package admin_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"sheepdog/frontends/admin/admintest"
	"sheepdog/frontends/admin/api"
	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// upload sends the head of a call and a part of its body by hand.
func upload(t *testing.T, s *admintest.Sheep, head string, body []byte) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", s.Address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(time.Minute))
	if _, err := fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: %s\r\n%s: test\r\n", head, s.Address, api.ClientHeader); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(body); err != nil {
		t.Fatal(err)
	}
	return conn.(*net.TCPConn)
}

func answered(t *testing.T, conn net.Conn) int {
	t.Helper()
	r, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	return r.StatusCode
}

// A write whose content breaks off is none that was carried out, whoever still listens: a proxy may.
func TestWriteThatBreaksOff(t *testing.T) {
	s, volumes := start(t, nil)
	if _, err := volumes.Create(context.Background(), vdi.CreateOptions{Name: "vm", Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	for name, body := range map[string]string{
		"of a length":  "Content-Length: 8192\r\n\r\n" + string(bytes.Repeat([]byte("x"), 4096)),
		"of any":       "Transfer-Encoding: chunked\r\n\r\n1000\r\n" + string(bytes.Repeat([]byte("x"), 4096)) + "\r\n",
		"within chunk": "Transfer-Encoding: chunked\r\n\r\n2000\r\n" + string(bytes.Repeat([]byte("x"), 4096)),
	} {
		conn := upload(t, s, "PUT /api/v1/vdis/vm/data", []byte("Content-Type: "+api.TypeBytes+"\r\n"+body))
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if status := answered(t, conn); status/100 == 2 {
			t.Errorf("%s: half a write is answered with status %d", name, status)
		}
	}
}

// An import that fails takes back what it has made, and no VDI of that name that others have made since through another node.
func TestFailedImportLeavesWhatOthersMade(t *testing.T) {
	c := vditest.NewCluster(t, 1)
	a, b := c.Gateway("a"), c.Gateway("b")
	s := admintest.Start(t, a.Service, nil)

	var stream bytes.Buffer
	w, err := api.NewExtentWriter(&stream, 4<<20)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Data(0, bytes.Repeat([]byte("i"), 1<<20)); err != nil {
		t.Fatal(err)
	}
	conn := upload(t, s, "PUT /api/v1/vdis/vm/extents?create=true", fmt.Appendf(nil, "Content-Type: %s\r\nContent-Length: %d\r\n\r\n%s", api.TypeExtents, 8<<20, stream.Bytes()))
	there := func() bool {
		b.CatchUp()
		_, err := b.Service.Info(ctx(t), "vm", "")
		return err == nil
	}
	for end := time.Now().Add(time.Minute); !there(); {
		if time.Now().After(end) {
			t.Fatal("the import makes nothing")
		}
	}
	if err := b.Service.Delete(ctx(t), "vm", ""); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Millisecond) // it is made at another time
	if _, err := b.Service.Create(ctx(t), vdi.CreateOptions{Name: "vm", Size: 4 << 20}); err != nil {
		t.Fatal(err)
	}
	v, err := b.Service.Open(ctx(t), "vm", "", vdi.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.WriteAt(ctx(t), []byte("mine"), 0); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if status := answered(t, conn); status/100 == 2 {
		t.Errorf("half an import is answered with status %d", status)
	}
	b.CatchUp()
	got := make([]byte, 4)
	if _, err := v.ReadAt(ctx(t), got, 0); err != nil && err != io.EOF || string(got) != "mine" {
		t.Errorf("what was made meanwhile has %q: %v", got, err)
	}
	if err := v.Close(); err != nil {
		t.Error(err)
	}
}

func ctx(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// Who says that he sends nothing more is taken for gone, and gets no answer, or what says that it is not all there is.
func TestHalfClosedDownload(t *testing.T) {
	s, volumes := start(t, nil)
	const size = 64 << 20
	if _, err := volumes.Create(ctx(t), vdi.CreateOptions{Name: "vm", Size: size}); err != nil {
		t.Fatal(err)
	}
	v, err := volumes.Open(ctx(t), "vm", "", vdi.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.WriteAt(ctx(t), bytes.Repeat([]byte("x"), size), 0); err != nil {
		t.Fatal(err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := volumes.Snapshot(ctx(t), "vm", "s"); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"data", "extents", "backup?snapshot=s"} {
		for _, later := range []bool{false, true} {
			conn := upload(t, s, "GET /api/v1/vdis/vm/"+path, []byte("\r\n"))
			in := bufio.NewReader(conn)
			if later {
				if _, err := in.Peek(1); err != nil {
					t.Fatal(err)
				}
			}
			if err := conn.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			r, err := http.ReadResponse(in, nil)
			if err != nil || r.StatusCode != http.StatusOK {
				continue
			}
			b, err := io.ReadAll(r.Body)
			if path == "extents" {
				err = readExtents(b)
			}
			if err == nil && len(b) < size {
				t.Errorf("%s, later %v: the answer ends well after %d bytes", path, later, len(b))
			}
		}
	}
}

// readExtents reads a stream to its end.
func readExtents(b []byte) error {
	in, err := api.NewExtentReader(bytes.NewReader(b))
	for err == nil {
		_, err = in.Next()
	}
	if err == io.EOF {
		return nil
	}
	return err
}

// What an import has written before it makes its VDI larger is durable when it is answered, or the import fails: also if it is another client
// whose flush is told meanwhile that it may be lost.
func TestImportKnowsWhatIsLost(t *testing.T) {
	w := vditest.NewWorld(t)
	volumes := w.Start()
	s := admintest.Start(t, volumes, nil)
	var stream bytes.Buffer
	out, err := api.NewExtentWriter(&stream, api.UnknownSize)
	if err != nil {
		t.Fatal(err)
	}
	if err := out.Data(0, bytes.Repeat([]byte("i"), 1<<20)); err != nil {
		t.Fatal(err)
	}
	conn := upload(t, s, "PUT /api/v1/vdis/vm/extents?create=true", fmt.Appendf(nil, "Content-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n", api.TypeExtents, stream.Len(), stream.Bytes()))
	stream.Reset()
	got := make([]byte, 1<<20)
	var v *vdi.Volume
	for end := time.Now().Add(time.Minute); got[len(got)-1] != 'i'; {
		if time.Now().After(end) {
			t.Fatal("the import writes nothing")
		}
		if v == nil || v.Size() == 0 {
			if v, err = volumes.Open(ctx(t), "vm", "", vdi.OpenOptions{}); err != nil {
				continue
			}
			defer v.Close()
		}
		if v.Size() > 0 {
			if _, err := v.ReadAt(ctx(t), got, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	w.Objects.Restart(rand.New(rand.NewPCG(1, 1)), 0)
	if err := v.Flush(ctx(t)); err == nil {
		t.Fatal("nothing is lost")
	}
	const far = 300 << 20
	if err := out.Data(far, []byte("end")); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(far + 4096); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintf(conn, "%x\r\n%s\r\n0\r\n\r\n", stream.Len(), stream.Bytes()); err != nil {
		t.Fatal(err)
	}
	if status := answered(t, conn); status/100 == 2 {
		t.Errorf("an import that has lost what it wrote is answered with status %d", status)
	}
}

// A call that changes something is sent once, also when it goes by a connection that was used before, and who gets no answer is told that it may
// be done. One that only reads may be sent again, and says nothing of the kind.
func TestUnansweredChangeIsNotRepeated(t *testing.T) {
	for _, slow := range []bool{false, true} {
		var mu sync.Mutex
		calls := map[string]int{}
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			calls[r.Method]++
			first := calls[r.Method] == 1 && r.Method == http.MethodGet
			mu.Unlock()
			io.Copy(io.Discard, r.Body)
			switch {
			case first:
				io.WriteString(w, "[]")
			case slow:
				<-r.Context().Done()
			default:
				panic(http.ErrAbortHandler)
			}
		}))
		defer s.Close()
		c, err := api.New(s.URL, api.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Nodes(context.Background()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		if slow {
			cancel()
			ctx, cancel = context.WithTimeout(context.Background(), 300*time.Millisecond)
		}
		_, err = c.Snapshot(ctx, "vm", "s")
		cancel()
		e, ok := errors.AsType[*api.Error](err)
		if !ok || !strings.Contains(e.Hint, "may be done") || !strings.Contains(e.Hint, "dog vdi list") {
			t.Errorf("slow %v: %v, with the hint %q", slow, err, e.Hint)
		}
		mu.Lock()
		posts := calls[http.MethodPost]
		mu.Unlock()
		if posts != 1 {
			t.Errorf("slow %v: the snapshot was asked for %d times", slow, posts)
		}
		if slow {
			continue
		}
		if _, err = c.Nodes(context.Background()); err == nil {
			t.Error("what broke off was answered")
		}
		if e, ok := errors.AsType[*api.Error](err); !ok || strings.Contains(e.Hint, "may be done") {
			t.Errorf("of what only reads: %v, with the hint %q", err, e.Hint)
		}
	}
}
