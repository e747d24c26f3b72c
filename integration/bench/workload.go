package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"sheepdog/integration/client"
)

// workload is one kind of work, done by fio's NBD engine, by nbdcopy, or, where neither can (FUA), by this
// program's own client.
type workload struct {
	name, unit   string
	goal         float64 // ratio to nbdkit that is wanted
	goalAbsolute float64 // figure that is wanted
	run          func(ctx context.Context, s *server, o options) (value, ops float64, err error)
}

const millisecond = time.Millisecond

var groups = []group{
	{name: "requests", peers: []string{"nbdkit", "qemu-nbd"}, cases: []workload{
		{"4k-randread-qd1", "IOPS", 1.0, 0, fio("randread", "4k", 1)},
		{"4k-randread-qd32", "IOPS", 1.3, 0, fio("randread", "4k", 32)},
		{"4k-randwrite-qd1", "IOPS", 1.0, 0, fio("randwrite", "4k", 1)},
		{"4k-randwrite-qd32", "IOPS", 1.3, 0, fio("randwrite", "4k", 32)},
		{"4k-randwrite-fua-qd32", "IOPS", 3.0, 0, fua(32)},
		{"1m-read-qd4", "MB/s", 1.0, 0, fio("read", "1m", 4)},
		{"1m-write-qd4", "MB/s", 1.0, 0, fio("write", "1m", 4)},
	}},
	{name: "copies", peers: []string{"nbdkit", "qemu-nbd"}, cases: []workload{
		{"nbdcopy-full-in", "MB/s", 1.0, 0, copyIn("full")},
		{"nbdcopy-full-out", "MB/s", 1.0, 0, copyOut},
		{"nbdcopy-sparse-in", "MB/s", 1.0, 0, copyIn("sparse")},
		{"nbdcopy-sparse-out", "MB/s", 1.0, 0, copyOut},
	}},
	{name: "slow-store", delay: millisecond, peers: []string{"nbdkit"}, cases: []workload{
		{"1ms-randread-qd32", "IOPS", 0, 20_000, fio("randread", "4k", 32)},
		{"1ms-randwrite-qd32", "IOPS", 0, 20_000, fio("randwrite", "4k", 32)},
	}},
}

// fio runs one job of fio's NBD engine on one connection.
func fio(rw, bs string, depth int) func(context.Context, *server, options) (float64, float64, error) {
	return func(ctx context.Context, s *server, o options) (value, ops float64, err error) {
		return fioJob(ctx, s.dir, o, rw, bs, depth, "--ioengine=nbd", "--uri="+s.uri(), fmt.Sprintf("--size=%dM", o.sizeMiB), "--fallocate=none")
	}
}

// fioJob runs one job of fio in a directory. Its value is IOPS if blocks are 4 KiB, else MB/s.
func fioJob(ctx context.Context, dir string, o options, rw, bs string, depth int, args ...string) (value, ops float64, err error) {
	cmd := exec.CommandContext(ctx, "fio", append(args, "--name=j", "--rw="+rw, "--bs="+bs, fmt.Sprint("--iodepth=", depth), "--time_based",
		fmt.Sprint("--runtime=", int(o.runtime.Seconds())), "--output-format=json", "--norandommap", "--randrepeat=0")...)
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		return 0, 0, fmt.Errorf("fio: %w: %s", err, stderrOf(err))
	}
	var r struct {
		Jobs []struct {
			Read, Write struct {
				IOPS     float64 `json:"iops"`
				BWBytes  float64 `json:"bw_bytes"`
				TotalIOs float64 `json:"total_ios"`
			}
		}
	}
	start := strings.IndexByte(string(out), '{') // warnings may come first
	if start < 0 {
		return 0, 0, fmt.Errorf("fio printed no JSON: %s", out)
	}
	if err := json.Unmarshal(out[start:], &r); err != nil || len(r.Jobs) != 1 {
		return 0, 0, fmt.Errorf("fio's output: %v: %s", err, out)
	}
	j := r.Jobs[0]
	ops = j.Read.TotalIOs + j.Write.TotalIOs
	if bs == "4k" {
		return j.Read.IOPS + j.Write.IOPS, ops, nil
	}
	return (j.Read.BWBytes + j.Write.BWBytes) / 1e6, ops, nil
}

// fua writes 4 KiB blocks at random places with FUA, so many in flight on one connection.
// One goroutine does it, answering all replies that have come with as many requests in one
// call: the client shares the processors with the server and must not be what is measured.
func fua(depth int) func(context.Context, *server, options) (float64, float64, error) {
	return func(ctx context.Context, s *server, o options) (value, ops float64, err error) {
		conn, size, err := client.DialRaw(s.network, s.address, s.export)
		if err != nil {
			return 0, 0, err
		}
		defer conn.Close()
		w := fuaWriter{conn: conn, blocks: size / 4096, random: rand.New(rand.NewPCG(1, uint64(time.Now().UnixNano())))}
		replies := bufio.NewReaderSize(conn, depth*replyBytes)
		began, done := time.Now(), 0
		if err := w.write(depth); err != nil {
			return 0, 0, err
		}
		for flying := depth; flying > 0; {
			n, err := takeReplies(replies)
			if err != nil {
				return 0, 0, err
			}
			done += n
			flying -= n
			if time.Since(began) < o.runtime && ctx.Err() == nil {
				if err := w.write(n); err != nil {
					return 0, 0, err
				}
				flying += n
			}
		}
		took := time.Since(began).Seconds()
		_, err = conn.Write(client.Request(client.CmdDisc, 0, 0, 0, 0))
		return float64(done) / took, float64(done), err
	}
}

type fuaWriter struct {
	conn   net.Conn
	blocks uint64
	random *rand.Rand
	cookie uint64
	out    []byte
	block  [4096]byte
}

// write sends so many requests.
func (w *fuaWriter) write(count int) error {
	w.out = w.out[:0]
	for range count {
		w.cookie++
		binary.LittleEndian.PutUint64(w.block[:], w.cookie)
		w.out = append(w.out, client.Request(client.CmdWrite, client.FlagFUA, w.cookie, w.random.Uint64N(w.blocks)*4096, 4096)...)
		w.out = append(w.out, w.block[:]...)
	}
	_, err := w.conn.Write(w.out)
	return err
}

const replyBytes = 16

// takeReplies waits for a reply and takes all that have come; each must be good.
func takeReplies(r *bufio.Reader) (n int, err error) {
	for n == 0 || r.Buffered() >= replyBytes {
		h, err := r.Peek(replyBytes)
		if err != nil {
			return n, err
		}
		if binary.BigEndian.Uint32(h) != client.SimpleReply {
			return n, errors.New("reply without magic")
		}
		if e := client.Errno(binary.BigEndian.Uint32(h[4:])); e != 0 {
			return n, e
		}
		r.Discard(replyBytes)
		n++
	}
	return n, nil
}

// copyIn copies an image onto a fresh volume with nbdcopy and makes it durable.
func copyIn(kind string) func(context.Context, *server, options) (float64, float64, error) {
	return func(ctx context.Context, s *server, o options) (value, ops float64, err error) {
		image, size, err := image(o, filepath.Dir(s.dir), kind)
		if err != nil {
			return 0, 0, err
		}
		if err := s.fresh(ctx, size); err != nil {
			return 0, 0, err
		}
		settle(s.cpu)
		return timed(ctx, size, "nbdcopy", "--flush", image, s.uri())
	}
}

// copyOut reads the volume that the last copyIn left.
func copyOut(ctx context.Context, s *server, o options) (value, ops float64, err error) {
	return timed(ctx, s.size, "nbdcopy", s.uri(), "null:")
}

func timed(ctx context.Context, size int64, program string, args ...string) (value, ops float64, err error) {
	began := time.Now()
	if out, err := exec.CommandContext(ctx, program, args...).CombinedOutput(); err != nil {
		return 0, 0, fmt.Errorf("%s: %w: %s", program, err, out)
	}
	return float64(size) / 1e6 / time.Since(began).Seconds(), float64(size) / 4096, nil
}

// image makes the file to copy once per run: full of random bytes, or sparse with data in one part of sixteen.
func image(o options, dir, kind string) (path string, size int64, err error) {
	path, size = filepath.Join(dir, kind+".image"), int64(o.sizeMiB)<<20
	step := int64(1 << 20)
	if kind == "sparse" {
		size *= 4
		step *= 16
	}
	if _, err := os.Stat(path); err == nil {
		return path, size, nil
	}
	f, err := os.Create(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	p := make([]byte, 1<<20)
	random := rand.NewChaCha8([32]byte{1})
	for off := int64(0); off < size; off += step {
		random.Read(p)
		if _, err := f.WriteAt(p, off); err != nil {
			return "", 0, err
		}
	}
	return path, size, f.Truncate(size)
}

func stderrOf(err error) string {
	if exit, ok := err.(*exec.ExitError); ok {
		return string(exit.Stderr)
	}
	return ""
}
