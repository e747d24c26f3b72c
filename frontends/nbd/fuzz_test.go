package nbd

import (
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"sheepdog/frontends/internal/listen"
	"sheepdog/frontends/nbd/internal/wire"
)

// FuzzSession feeds arbitrary bytes to a whole session, over a socket and over a
// pipe. Whatever comes, the server stays up, its bounds hold, and nothing is left.
func FuzzSession(f *testing.F) {
	greet := []byte{0, 0, 0, 3}
	for _, headers := range allHeaders {
		seed := slices.Clone(greet)
		switch headers {
		case wire.Structured:
			seed = append(seed, optionMessage(wire.NBD_OPT_STRUCTURED_REPLY, nil)...)
		case wire.Extended:
			seed = append(seed, optionMessage(wire.NBD_OPT_EXTENDED_HEADERS, nil)...)
		}
		seed = append(seed, optionMessage(wire.NBD_OPT_LIST, nil)...)
		seed = append(seed, optionMessage(wire.NBD_OPT_LIST_META_CONTEXT, metaData("vm1", "qemu:"))...)
		seed = append(seed, optionMessage(wire.NBD_OPT_SET_META_CONTEXT, metaData("vm1", contextAllocation))...)
		seed = append(seed, optionMessage(wire.NBD_OPT_INFO, infoData("vm1@s1", 0, 1, 2, 3))...)
		seed = append(seed, optionMessage(wire.NBD_OPT_GO, infoData("vm1", 3))...)
		for typ := range uint16(9) {
			r := wire.Request{Type: typ, Cookie: uint64(typ), Offset: 100, Length: 50}
			if typ == wire.NBD_CMD_DISC {
				continue
			}
			payload := []byte(nil)
			if typ == wire.NBD_CMD_WRITE {
				payload = make([]byte, 50)
				if headers == wire.Extended {
					r.Flags = wire.NBD_CMD_FLAG_PAYLOAD_LEN
				}
			}
			seed = append(seed, requestMessage(headers, r, payload)...)
		}
		f.Add(seed)
	}
	st := newStore(map[string]int64{"vm1": 128 << 10})
	st.snapshot("vm1", "s1")
	s, err := New(Config{Volumes: st, HandshakeTimeout: 5 * time.Second, Limits: listen.Limits{LingerTimeout: 100 * time.Millisecond}})
	if err != nil {
		f.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	go s.Serve(f.Context(), l)
	pipes := make(pipeListener)
	go s.Serve(f.Context(), pipes)
	f.Fuzz(func(t *testing.T, data []byte) {
		socket, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		ours, pipe := net.Pipe()
		pipes <- ours
		for _, conn := range []net.Conn{socket, pipe} {
			conn.SetDeadline(time.Now().Add(10 * time.Second))
			go func() {
				conn.Write(data)
				if tcp, ok := conn.(*net.TCPConn); ok {
					tcp.CloseWrite()
				} else {
					time.AfterFunc(2*time.Millisecond, func() { conn.Close() })
				}
			}()
			io.Copy(io.Discard, conn)
			conn.Close()
		}
		for end := time.Now().Add(10 * time.Second); s.Counters().Connections != 0; time.Sleep(100 * time.Microsecond) {
			if time.Now().After(end) {
				t.Fatalf("something is left: %+v", s.Counters())
			}
		}
		if c := s.Counters(); c.BufferBytes != 0 || c.InFlight != 0 || st.opens.Load() != 0 {
			t.Fatalf("something is left: %+v, %d volumes", c, st.opens.Load())
		}
	})
}

// pipeListener accepts what is put into it.
type pipeListener chan net.Conn

func (l pipeListener) Accept() (net.Conn, error) { return <-l, nil }
func (l pipeListener) Close() error              { return nil }
func (l pipeListener) Addr() net.Addr            { return &net.UnixAddr{Net: "pipe"} }
