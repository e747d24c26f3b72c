package nbd

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"sheepdog/frontends/nbd/internal/wire"
	"sheepdog/vdi"
)

// null is a volume that does nothing at once.
type null struct{ sparse }

func (*null) Size() int64           { return 1 << 40 }
func (*null) Heard()                {}
func (*null) Submit(r *vdi.Request) { r.Err = nil; r.Done(r) }

type nullVolumes struct{ sparseVolumes }

func (nullVolumes) Open(context.Context, string, string, string) (Volume, error) { return &null{}, nil }

// BenchmarkSession measures what the server adds to a volume that takes no time. A
// client in the same process sends depth requests at once and reads all answers.
func BenchmarkSession(b *testing.B) {
	for _, network := range []string{"unix", "tcp"} {
		for _, x := range []struct {
			name  string
			typ   uint16
			size  int
			depth int
		}{
			{"read4k", wire.NBD_CMD_READ, 4096, 1}, {"read4k", wire.NBD_CMD_READ, 4096, 32},
			{"write4k", wire.NBD_CMD_WRITE, 4096, 1}, {"write4k", wire.NBD_CMD_WRITE, 4096, 32},
			{"read1m", wire.NBD_CMD_READ, mib, 4}, {"write1m", wire.NBD_CMD_WRITE, mib, 4},
			{"flush", wire.NBD_CMD_FLUSH, 0, 32},
		} {
			b.Run(fmt.Sprintf("%s/%s/depth%d", network, x.name, x.depth), func(b *testing.B) { benchmark(b, network, x.typ, x.size, x.depth) })
		}
	}
}

func benchmark(b *testing.B, network string, typ uint16, size, depth int) {
	s, err := New(Config{Volumes: nullVolumes{}})
	if err != nil {
		b.Fatal(err)
	}
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(b.TempDir(), "s")
	}
	l, err := net.Listen(network, address)
	if err != nil {
		b.Fatal(err)
	}
	go s.Serve(b.Context(), l)
	defer s.Shutdown(context.Background())
	conn, err := net.Dial(network, l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	c := newClient(b, conn)
	c.greet(wire.NBD_FLAG_C_FIXED_NEWSTYLE)
	c.goExport("null")
	conn.SetDeadline(time.Time{})

	var one []byte
	r := wire.Request{Type: typ, Length: uint64(size)}
	answer := wire.SimpleReplySize
	switch typ {
	case wire.NBD_CMD_WRITE:
		one = requestMessage(wire.Simple, r, make([]byte, size))
	case wire.NBD_CMD_READ:
		answer += size
		fallthrough
	default:
		one = requestMessage(wire.Simple, r, nil)
	}
	var batch []byte
	for range depth {
		batch = append(batch, one...)
	}
	replies := make([]byte, depth*answer)
	b.ReportAllocs()
	b.SetBytes(int64(size))
	b.ResetTimer()
	for n := 0; n < b.N; n += depth {
		k := min(depth, b.N-n)
		done := make(chan error, 1)
		if size*depth > 64<<10 && typ == wire.NBD_CMD_WRITE {
			go func() { _, err := conn.Write(batch[:k*len(one)]); done <- err }()
		} else {
			_, err := conn.Write(batch[:k*len(one)])
			done <- err
		}
		if _, err := io.ReadFull(conn, replies[:k*answer]); err != nil {
			b.Fatal(err)
		}
		if err := <-done; err != nil {
			b.Fatal(err)
		}
		if errno := binary.BigEndian.Uint32(replies[4:]); errno != 0 {
			b.Fatalf("error %d", errno)
		}
	}
	b.StopTimer()
	conn.Close()
}
