package main

import (
	"context"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"sheepdog/frontends/admin/admintest"
	"sheepdog/frontends/admin/api"
	"sheepdog/storage/object"
	"sheepdog/vdi/vditest"
)

var update = flag.Bool("update", false, "write the golden files anew")

// What is different each time.
var changing = []struct {
	find *regexp.Regexp
	put  string
}{
	{regexp.MustCompile(`\b[0-9a-f]{32}\b`), "IDENTITY"},
	{regexp.MustCompile(`127\.0\.0\.1:\d{5}\b`), "ADDRESS"},
	{regexp.MustCompile(`\n *"last_sweep": "[^"]*",`), ""}, // it may be under way
	{regexp.MustCompile(`"sweeping": true`), `"sweeping": false`},
	{regexp.MustCompile(`waited for \d+ ms`), "waited for N ms"},
	{regexp.MustCompile(`"pause": [-0-9.e]+`), `"pause": SECONDS`},
	{regexp.MustCompile(`(?m)^(vm1 \d \d \d+) [-0-9.e]+ `), "$1 SECONDS "},
	{regexp.MustCompile(`go1\.[0-9.]+[-\w]*`), "GOVERSION"},
}

// Each golden file is a session with a fresh sheep: lines "$ dog …" and what comes of them,
// on both outputs, and the status if it is not 0. "$ write NAME OFF BYTES" writes content,
// "$ reset" unformats the sheep, "$ flock" makes it one of four, "$ trouble" breaks its disk, "$ client" connects somebody,
// "$ leftover NAME INDEX" makes an object of a VDI that its map does not name.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/golden/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("there are no golden files: ", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := session(t, string(want))
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != string(want) {
				t.Errorf("%s: the output is another than in the file (look at it, then go test -update)\n--- got\n%s", file, got)
			}
		})
	}
}

// session carries out the commands of a golden file.
func session(t *testing.T, text string) string {
	r := newRig(t)
	var b strings.Builder
	for _, line := range strings.Split(text, "\n") {
		switch {
		case strings.HasPrefix(line, "#"):
			b.WriteString(line + "\n")
		case strings.HasPrefix(line, "$ "):
			b.WriteString(line + "\n")
			b.WriteString(golden(t, r, strings.TrimPrefix(line, "$ ")))
		}
	}
	return b.String()
}

func golden(t *testing.T, r *rig, line string) string {
	words := strings.Fields(line)
	switch words[0] {
	case "dog":
		x := r.dog(unquoted(words[1:])...)
		text := x.out + x.err
		for _, c := range changing {
			text = c.find.ReplaceAllString(text, c.put)
		}
		if text != "" && !strings.HasSuffix(text, "\n") {
			text += "\n"
		}
		if x.code != exitDone {
			text += "[status " + string('0'+rune(x.code)) + "]\n"
		}
		return text
	case "write":
		n, err := parseSize(words[3])
		if err != nil {
			t.Fatal(err)
		}
		x := r.dogWith(content(1, int(n)), "vdi", "write", words[1], words[2])
		return x.out + x.err
	case "leftover":
		info, err := r.volumes.Info(context.Background(), words[1], "")
		index, err2 := strconv.ParseUint(words[2], 10, 32)
		if err := errors.Join(err, err2); err != nil {
			t.Fatal(err)
		}
		r.world.Objects.Put(vditest.Policy, object.DataID(info.VID, uint32(index)), 22, 0, []byte("x"))
		return ""
	case "reset":
		r.sheep.Lock()
		defer r.sheep.Unlock()
		r.sheep.Formatted = false
		return ""
	case "flock":
		r.sheep.Join(t, r.volumes)
		return ""
	case "trouble":
		r.sheep.Lock()
		defer r.sheep.Unlock()
		d := &r.sheep.Disks[0]
		d.State, d.Reason, d.Errors = api.DiskFull, "less than the reserve is free", map[string]uint64{"checksum": 2, "write": 1}
		d.Scrub.LastEnd = &admintest.Then
		d.Corrupt = []api.CorruptObject{{Object: "00123456000000ab", Blocks: []uint32{3, 4}}}
		return ""
	case "client":
		r.sheep.Lock()
		defer r.sheep.Unlock()
		r.sheep.Clients = append(r.sheep.Clients, api.Session{
			ID: "nbd-7", Protocol: "nbd", Peer: "10.0.0.7:51234", Listener: "127.0.0.1:10809", Export: "vm 1@first", ReadOnly: true, TLS: true, Started: admintest.Then.Add(time.Minute),
			Reads: 12, Writes: 0, Errors: 1, ReadBytes: 5 << 20, InFlight: 3, Detail: "extended headers",
		})
		return ""
	}
	t.Fatalf("golden file: %q", line)
	return ""
}

// unquoted puts words in quotes together.
func unquoted(words []string) (list []string) {
	for i := 0; i < len(words); i++ {
		w := words[i]
		for strings.Count(w, "'") == 1 && i+1 < len(words) {
			i++
			w += " " + words[i]
		}
		list = append(list, strings.ReplaceAll(w, "'", ""))
	}
	return list
}
