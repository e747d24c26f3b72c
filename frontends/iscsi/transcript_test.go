package iscsi

import (
	"bytes"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the transcripts anew")

// What Windows and ESXi send when they log in to a target, find its units and mount them, with the
// right answers. Each file of testdata is a session: "#" begins a remark; "login" has the keys of a login
// request of the operational stage; "> CDB" is a command, with "in N" or "out HEX" what it expects to get or sends. What
// follows is what came of it.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("there are no transcripts: ", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := replay(t, string(want))
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != string(want) {
				t.Errorf("%s: the answers are others than in the file (look at them, then go test -update)\n%s", file, firstDifference(string(want), got))
			}
		})
	}
}

func firstDifference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range min(len(w), len(g)) {
		if w[i] != g[i] {
			return fmt.Sprintf("line %d\n  is   %s\n  want %s", i+1, g[i], w[i])
		}
	}
	return fmt.Sprintf("%d lines in place of %d", len(g), len(w))
}

func replay(t *testing.T, text string) string {
	h := serve(t, nil)
	d := h.store.disks["vm1"]
	d.ID = [8]byte{0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58}
	h.store.paths = []Path{{Group: 1, Owner: true}, {Group: 2}, {Group: 3, Down: true}}
	var c *client
	var out strings.Builder
	for _, line := range strings.Split(text, "\n") {
		words := strings.Fields(line)
		switch {
		case strings.HasPrefix(line, "#"), line == "":
			out.WriteString(line + "\n")
		case words[0] == "login":
			out.WriteString(line + "\n")
			c = h.dial()
			c.tryLogin("vm1", words[1], 1, words[2:]...)
			for _, key := range words[2:] {
				name, _, _ := strings.Cut(key, "=")
				if answer, ok := c.answered[name]; ok {
					fmt.Fprintf(&out, "  %s=%s\n", name, answer)
				}
			}
			fmt.Fprintf(&out, "  TargetPortalGroupTag=%s\n", c.answered["TargetPortalGroupTag"])
		case words[0] == ">":
			out.WriteString(line + "\n" + c.replay(t, words[1:]))
		}
	}
	return strings.TrimRight(out.String(), "\n") + "\n"
}

// replay sends one command and says what came of it.
func (c *client) replay(t *testing.T, words []string) string {
	cdb, err := hex.DecodeString(words[0])
	if err != nil {
		t.Fatal(err)
	}
	flags, n, data := byte(0x80), 0, []byte(nil)
	if len(words) > 2 && words[1] == "in" {
		flags = fRead
		if n, err = strconv.Atoi(words[2]); err != nil {
			t.Fatal(err)
		}
	} else if len(words) > 2 && words[1] == "out" {
		flags = fWrite
		if data, err = hex.DecodeString(words[2]); err != nil {
			t.Fatal(err)
		}
		if len(words) > 4 && words[3] == "blocks" { // so many of 512 bytes that begin so
			k, err := strconv.Atoi(words[4])
			if err != nil {
				t.Fatal(err)
			}
			data = bytes.Repeat(append(data, make([]byte, 512-len(data))...), k)
		}
		n = len(data)
	}
	c.send(c.command(flags, n, cdb...), data)
	r := c.finish()
	text := fmt.Sprintf("< status %02x", r.status)
	if r.status == 2 {
		text += fmt.Sprintf(" sense %x/%02x/%02x", r.sense[0], r.sense[1], r.sense[2])
	}
	if r.over != 0 {
		text += fmt.Sprintf(" residual %d", r.over)
	}
	text += "\n"
	for b := bytes.TrimRight(r.data, "\x00"); len(b) > 0; {
		k := min(len(b), 32)
		text += "  " + hex.EncodeToString(b[:k]) + "\n"
		b = b[k:]
	}
	if z := len(r.data) - len(bytes.TrimRight(r.data, "\x00")); z > 0 {
		text += fmt.Sprintf("  and %d bytes of zeros\n", z)
	}
	return text
}
