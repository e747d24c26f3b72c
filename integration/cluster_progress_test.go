package integration

import (
	"fmt"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// progress is what dog node recovery says, with -o json.
type progress struct {
	Moving, Degraded int
	Transfers        []struct{ Source, Node string }
	LeftObjects      int64   `json:"left_objects"`
	LeftBytes        int64   `json:"left_bytes"`
	DoneBytes        int64   `json:"done_bytes"`
	BytesPerSecond   float64 `json:"bytes_per_second"`
	ETA              int64
}

// What is said of a recovery while it goes on: what is left becomes less, the time that it is said to take is about that
// which it takes, and in the end nothing is left.
func TestFlockTellsHowFarRecoveryIs(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlock(t, 3, 3)
	f.Nodes[0].Dog("vdi", "create", "v", fmt.Sprint(progressPieces<<20))
	f.Know("v")
	for try := range uint64(4) {
		f.Nodes[2].Stop()
		conn := f.Nodes[0].Dial("v")
		for i := range uint64(progressPieces) {
			if err := conn.Write(rig.Random(try<<32|i, 1<<20), i<<20, 0); err != nil {
				t.Fatal(err)
			}
		}
		conn.Close()
		f.Nodes[2].Start()
		if looksAtProgress(t, f) {
			return
		}
		t.Log("it went on while nobody looked: once more")
		f.WaitWhole(wholeLimit)
	}
	t.Error("a recovery cannot be watched")
}

// progressPieces are what is to be brought, of 1 MiB each: more than a node takes in a second.
const progressPieces = 256

// looksAtProgress holds what is said of a recovery against what becomes of it. It reports false if too little was seen of it, as
// where this test's own processes have to wait for the processor.
func looksAtProgress(t *testing.T, f *rig.Flock) bool {
	t.Helper()
	const pieces = progressPieces
	type sample struct {
		progress
		at time.Time
	}
	var samples []sample // with something under way
	var last progress
	for deadline := time.Now().Add(wholeLimit); ; {
		last = progress{}
		f.Nodes[0].DogJSON(&last, "node", "recovery")
		if len(last.Transfers) > 0 {
			samples = append(samples, sample{last, time.Now()})
		}
		if last.Moving == 0 && last.Degraded == 0 && len(last.Transfers) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("not all was brought to n3: %d looks, %+v", len(samples), last)
		}
	}
	ended := time.Now()
	if len(samples) < 6 {
		return false
	}
	if last.LeftObjects != 0 || last.LeftBytes != 0 || last.BytesPerSecond != 0 || last.ETA != 0 {
		t.Errorf("all is done, and it is said %+v", last)
	}
	var most, least, known, done int64 = 0, 1 << 62, 0, 0
	for _, s := range samples {
		if s.LeftBytes >= most {
			most, least = s.LeftBytes, 1<<62
		}
		least, done = min(least, s.LeftBytes), max(done, s.DoneBytes)
		for _, x := range s.Transfers {
			if x.Node != "n3" || x.Source == "n3" {
				t.Errorf("%s brings something to %s", x.Source, x.Node)
			}
		}
		if s.ETA < -1 || s.LeftBytes < 0 || s.LeftBytes > 8*pieces<<20 || s.DoneBytes > 2*pieces<<20 {
			t.Errorf("of %d bytes: %+v", pieces<<20, s.progress)
		}
		if s.ETA < 0 || s.LeftBytes == 0 {
			continue
		}
		known++
		takes := ended.Sub(s.at)
		if told := time.Duration(s.ETA) * time.Second; told > 10*takes+10*time.Second || takes > 10*told+10*time.Second {
			t.Errorf("it is said to take %v, and takes %v: %+v", told, takes, s.progress)
		}
	}
	t.Logf("%d looks in %v: %d MiB done, from %d MiB left down to %d; %d knew how long it takes", len(samples), ended.Sub(samples[0].at).Round(time.Millisecond), done>>20, most>>20, least>>20, known)
	if most == 0 || least > most/2 || done < pieces<<20/4 || known == 0 {
		t.Errorf("of %d bytes that are left at first, %d are at last, and %d are done; how long it takes was known %d times of %d", most, least, done, known, len(samples))
	}
	return true
}
