package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// Every VDI is an export under its own name, and so is every snapshot as NAME@TAG, read-only.
func TestExportsAreListed(t *testing.T) {
	rig.Need(t, "nbdinfo", "nbd-client")
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm1", "64M")
	s.Dog("vdi", "create", "vm2", "1G")
	s.Dog("vdi", "snapshot", "vm1", "-s", "monday")

	var list struct {
		Exports []struct {
			Name     string `json:"export-name"`
			Size     int64  `json:"export-size"`
			ReadOnly bool   `json:"is_read_only"`
			Multi    bool   `json:"can_multi_conn"`
			FUA      bool   `json:"can_fua"`
			Flush    bool   `json:"can_flush"`
			Trim     bool   `json:"can_trim"`
			Zero     bool   `json:"can_zero"`
			FastZero bool   `json:"can_fast_zero"`
			Cache    bool   `json:"can_cache"`
			DF       bool   `json:"can_df"`
		} `json:"exports"`
	}
	out := rig.OK(t, "nbdinfo", "--json", "--list", "nbd://"+s.NBD())
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%v in:\n%s", err, out)
	}
	got := map[string]string{}
	for _, e := range list.Exports {
		got[e.Name] = fmt.Sprint(e.Size, " ", e.ReadOnly)
		if !e.Multi || !e.Flush || !e.DF {
			t.Errorf("export %s lacks multi-conn, flush or DF: %+v", e.Name, e)
		}
		if !e.ReadOnly && (!e.FUA || !e.Trim || !e.Zero || !e.FastZero || !e.Cache) {
			t.Errorf("export %s lacks FUA, trim, zeroes, fast zero or cache: %+v", e.Name, e)
		}
	}
	for name, want := range map[string]string{"vm1": "67108864 false", "vm2": "1073741824 false", "vm1@monday": "67108864 true"} {
		if got[name] != want {
			t.Errorf("export %s: got %q, want %q", name, got[name], want)
		}
	}
	text := rig.OK(t, "nbdinfo", s.URI("vm1"))
	rig.Contains(t, text, "newstyle-fixed", "structured packets", "base:allocation", "block_size_minimum: 1")
	rig.Contains(t, rig.OK(t, "nbd-client", "-l", s.Host(), "-N", "x", fmt.Sprint(s.NBDPort)), "vm1", "vm2")
	rig.Contains(t, rig.Fails(t, "nbdinfo", s.URI("nosuch")), "nosuch")
}

// The map of a volume is known to 4 KiB, and changes since a snapshot without reading data.
func TestMapsAndDirtyBitmaps(t *testing.T) {
	rig.Need(t, "nbdinfo", "qemu-io")
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm1", "64M")
	rig.OK(t, "qemu-io", "-f", "raw", "-c", "write -P 1 0 8k", "-c", "write -P 2 4M 5M", "-c", "flush", s.URI("vm1"))

	extents(t, s.URI("vm1"), "base:allocation", "0 8192 0", "8192 4186112 3", "4194304 5242880 0", "9437184 57671680 3")

	s.Dog("vdi", "snapshot", "vm1", "-s", "monday")
	extents(t, s.URI("vm1"), "qemu:dirty-bitmap:monday", "0 67108864 0")
	rig.OK(t, "qemu-io", "-f", "raw", "-c", "write -P 3 4k 4k", "-c", "discard 8M 1M", "-c", "write -P 4 32M 4M", "-c", "flush", s.URI("vm1"))
	extents(t, s.URI("vm1"), "qemu:dirty-bitmap:monday", "0 4096 0", "4096 4096 1", "8192 8380416 0",
		"8388608 1048576 1", "9437184 24117248 0", "33554432 4194304 1", "37748736 29360128 0")
	// The snapshot itself goes on showing what was.
	extents(t, s.URI("vm1@monday"), "base:allocation", "0 8192 0", "8192 4186112 3", "4194304 5242880 0", "9437184 57671680 3")
	rig.OK(t, "qemu-io", "-r", "-f", "raw", "-c", "read -P 1 0 8k", "-c", "read -P 2 4M 5M", s.URI("vm1@monday"))
}

// extents holds a metadata context against lines of "offset length type".
func extents(t *testing.T, uri, context string, want ...string) {
	t.Helper()
	var list []struct{ Offset, Length, Type int64 }
	out := rig.OK(t, "nbdinfo", "--json", "--map="+context, uri)
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%v in:\n%s", err, out)
	}
	var got []string
	var off, length, kind int64 = 0, 0, -1
	for _, e := range append(list, struct{ Offset, Length, Type int64 }{Type: -2}) {
		if e.Type == kind { // neighbours may be told apart or together: both are right
			length += e.Length
			continue
		}
		if length > 0 {
			got = append(got, fmt.Sprint(off, " ", length, " ", kind))
		}
		off, length, kind = e.Offset, e.Length, e.Type
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("%s of %s:\n%s\nwant:\n%s", context, uri, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// nbdcopy brings images in and out, whole and sparse, over several connections.
func TestNBDCopy(t *testing.T) {
	rig.Need(t, "nbdcopy")
	s := rig.Start(t, rig.Options{})
	const size = 96 << 20
	for name, fill := range map[string]func(f *os.File){
		"full": func(f *os.File) { f.Write(rig.Random(1, size)) },
		"sparse": func(f *os.File) {
			for i := range 40 {
				f.WriteAt(rig.Random(uint64(i), 70_000), int64(i)*2_300_007)
			}
		},
		"empty": func(*os.File) {},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			image, back := filepath.Join(dir, name), filepath.Join(dir, name+".back")
			f, err := os.Create(image)
			if err != nil {
				t.Fatal(err)
			}
			fill(f)
			if err := f.Truncate(size); err != nil {
				t.Fatal(err)
			}
			f.Close()
			s.Dog("vdi", "create", name, fmt.Sprint(size))
			rig.OK(t, "nbdcopy", "--flush", image, s.URI(name))
			rig.OK(t, "nbdcopy", s.URI(name), back)
			same(t, image, back)
			if name != "full" {
				if used := rig.DiskUsage(t, dir); used > size {
					t.Errorf("copies take %d bytes: holes were filled", used)
				}
			}
			rig.OK(t, "nbdcopy", "--connections=4", "--requests=64", s.URI(name), back)
			same(t, image, back)
		})
	}
}

// same fails the test unless two files are equal.
func same(t *testing.T, a, b string) {
	t.Helper()
	x, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(x, y) {
		t.Fatalf("%s and %s differ", a, b)
	}
}

// Every command and every flag through libnbd's Python, with its own checks turned off where the server
// is to be asked things that it must refuse.
func TestNBDShell(t *testing.T) {
	rig.Need(t, "nbdsh")
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm1", "64M")
	s.Dog("vdi", "create", "vm2", "64M")
	s.Dog("vdi", "snapshot", "vm2", "-s", "t")
	scripts, err := filepath.Glob("testdata/nbdsh/*.py")
	if err != nil || len(scripts) < 5 {
		t.Fatalf("scripts: %v, %v", scripts, err)
	}
	for _, script := range scripts {
		t.Run(strings.TrimSuffix(filepath.Base(script), ".py"), func(t *testing.T) {
			text, err := os.ReadFile(script)
			if err != nil {
				t.Fatal(err)
			}
			prelude := fmt.Sprintf("uri=%q; ro=%q; unix=%q; server=%q\n", s.URI("vm1"), s.URI("vm2@t"), s.Unix, "nbd://"+s.NBD())
			r := rig.Run(t, 5*time.Minute, "", "nbdsh", "-c", prelude+string(text))
			if r.Code != 0 {
				t.Fatalf("%s%s", r.Stdout, r.Stderr)
			}
		})
	}
}

func TestQemuImg(t *testing.T) {
	rig.Need(t, "qemu-img", "qemu-io")
	s := rig.Start(t, rig.Options{})
	const size = 64 << 20
	image := rig.File(t, "image.raw", append(rig.Random(7, 20<<20), make([]byte, size-20<<20)...))
	s.Dog("vdi", "create", "vm1", fmt.Sprint(size))
	s.Dog("vdi", "create", "vm2", fmt.Sprint(size))
	uri := s.URI("vm1")

	rig.OK(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, uri)
	rig.Contains(t, rig.OK(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri), "identical")
	rig.Contains(t, rig.OK(t, "qemu-img", "info", uri), "64 MiB")

	var m []struct {
		Start, Length int64
		Data, Zero    bool
	}
	out := rig.OK(t, "qemu-img", "map", "--output=json", "-f", "raw", uri)
	if err := json.Unmarshal([]byte(out), &m); err != nil {
		t.Fatalf("%v in:\n%s", err, out)
	}
	if len(m) != 2 || !m[0].Data || m[0].Length != 20<<20 || m[1].Data || !m[1].Zero {
		t.Errorf("qemu-img map: %s", out)
	}

	// A qcow2 image in a volume, and a volume into a volume, eight coroutines out of order.
	qcow := filepath.Join(t.TempDir(), "image.qcow2")
	rig.OK(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, qcow)
	rig.OK(t, "qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "qcow2", "-O", "raw", qcow, s.URI("vm2"))
	rig.Contains(t, rig.OK(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri, s.URI("vm2")), "identical")

	rig.OK(t, "qemu-img", "bench", "-f", "raw", "-c", "2000", "-d", "32", "-s", "4096", uri)
	rig.OK(t, "qemu-img", "bench", "-w", "-f", "raw", "-c", "2000", "-d", "32", "-s", "4096", "--flush-interval=64", uri)
	rig.OK(t, "qemu-img", "bench", "-w", "-f", "raw", "-t", "none", "-c", "120", "-d", "8", "-s", "1M", "-S", "512k", uri)
}

func TestQemuIO(t *testing.T) {
	rig.Need(t, "qemu-io")
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm1", "64M")
	io := func(commands ...string) string {
		t.Helper()
		args := []string{"-f", "raw"}
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		out := rig.OK(t, "qemu-io", append(args, s.URI("vm1"))...)
		if strings.Contains(out, "failed") {
			t.Errorf("%v:\n%s", commands, out)
		}
		return out
	}
	io("write -P 0xaa 0 16M", "read -P 0xaa 0 16M")
	io("write -f -P 0xbb 4k 4k", "read -P 0xbb 4k 4k", "read -P 0xaa 0 4k", "read -P 0xaa 8k 64k") // -f is FUA
	io("discard 1M 1M", "read -P 0 1M 1M", "read -P 0xaa 2M 4k")
	io("write -z 4M 4M", "read -P 0 4M 4M")  // zeroes that stay allocated
	io("write -zu 8M 4M", "read -P 0 8M 4M") // zeroes that may become holes
	io("write -z 13000 777", "read -P 0 13000 777", "read -P 0xaa 12500 500", "flush")
	io("aio_write -P 1 20M 1M", "aio_write -P 2 21M 1M", "aio_flush", "read -P 1 20M 1M", "read -P 2 21M 1M")
	extents(t, s.URI("vm1"), "base:allocation", "0 1048576 0", "1048576 1048576 3", "2097152 6291456 0",
		"8388608 4194304 3", "12582912 4194304 0", "16777216 4194304 3", "20971520 2097152 0", "23068672 44040192 3")
	// A snapshot's export refuses writes.
	s.Dog("vdi", "snapshot", "vm1", "-s", "t")
	r := rig.Run(t, time.Minute, "", "qemu-io", "-f", "raw", "-c", "write 0 4k", s.URI("vm1@t"))
	if out := r.Stdout + r.Stderr; !strings.Contains(strings.ToLower(out), "read-only") && !strings.Contains(out, "not permitted") && !strings.Contains(out, "Permission denied") {
		t.Errorf("write to a snapshot: status %d\n%s", r.Code, out)
	}
}

// fio writes with checksums in the data, sixteen jobs with mixed block sizes, and reads all back.
func TestFioVerify(t *testing.T) {
	rig.Need(t, "fio")
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm1", "512M")
	job := rig.File(t, "verify.fio", []byte(`[global]
ioengine=nbd
uri=`+s.URI("vm1")+`
rw=randwrite
bssplit=512/10:4k/40:12k/10:64k/20:68k/10:1M/10
blockalign=512
verify=crc32c
verify_fatal=1
do_verify=1
iodepth=8
size=32M
io_size=32M
offset_increment=32M
numjobs=16
group_reporting=1
[verify]
`))
	dir := t.TempDir()
	r := rig.Run(t, 10*time.Minute, "", "sh", "-c", "cd "+dir+" && exec fio --output-format=terse "+job)
	if r.Code != 0 || strings.Contains(r.Stderr, "verify:") {
		t.Fatalf("fio: status %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	if n := strings.Count(s.Log(), "level=ERROR"); n > 0 {
		t.Errorf("%d errors in the log", n)
	}
}

// The unix socket serves the same exports.
func TestUnixSocket(t *testing.T) {
	rig.Need(t, "nbdinfo", "qemu-io")
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm1", "64M")
	uri := "nbd+unix:///vm1?socket=" + s.Unix
	rig.OK(t, "qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", "-c", "flush", uri)
	rig.OK(t, "qemu-io", "-f", "raw", "-c", "read -P 7 0 1M", s.URI("vm1"))
	rig.Contains(t, rig.OK(t, "nbdinfo", "--size", uri), "67108864")
}
