package stream

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"
)

type reply struct {
	Queued
	data []byte
	sent chan struct{}
}

func (r *reply) Render() [][]byte { return [][]byte{r.data} }
func (r *reply) Sent()            { close(r.sent) }

func newReply(data []byte) *reply { return &reply{data: data, sent: make(chan struct{})} }

func (r *reply) gone() bool {
	select {
	case <-r.sent:
		return true
	default:
		return false
	}
}

// pair is a stream and its client.
func pair(t *testing.T) (*Stream, *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return New(server, NewBudget(1<<20, time.Minute, func() {}), 1<<20, func() {}), client.(*net.TCPConn)
}

func read(t *testing.T, c net.Conn, want []byte) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes came that were not sent so", len(got))
	}
}

// TestAnswer: the only answer that a client waits for is sent when Answer returns, unless the socket is full; then, and if
// there are others, the sender does it.
func TestAnswer(t *testing.T) {
	s, client := pair(t)
	s.CountIn()
	one := newReply([]byte("one"))
	s.Answer(one)
	if !one.gone() {
		t.Error("the only answer was left to the sender")
	}
	read(t, client, []byte("one"))

	s.CountIn()
	s.CountIn()
	two, three := newReply([]byte("two")), newReply([]byte("three"))
	s.Answer(two)
	s.Answer(three)
	read(t, client, []byte("twothree"))

	s.CountIn()
	long := newReply(bytes.Repeat([]byte("long "), 8<<20))
	done := make(chan struct{})
	go func() {
		s.Answer(long)
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("Answer waits for the client")
	}
	if long.gone() {
		t.Error("more was sent than a socket takes")
	}
	read(t, client, long.data)
	<-long.sent
	if err := s.Finish(time.Second, nil); err != nil {
		t.Error(err)
	}
	if n := s.InFlight(); n != 0 {
		t.Errorf("%d answers are left", n)
	}
}
