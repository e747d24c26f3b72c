package integration

import (
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// fioLoad is fio at work on a volume of its own through one gateway: it writes all of it in random order with
// checksums in the data, reads that back, and begins anew with other content.
type fioLoad struct {
	t       *testing.T
	volume  string
	seed    int // of the content that is there, or is being written
	stop    chan struct{}
	wg      sync.WaitGroup
	rounds  int
	longest time.Duration // of all requests
}

const fioBytes = 12 << 20

// newFio makes the volume.
func newFio(t *testing.T, f *rig.Flock, volume string) *fioLoad {
	t.Helper()
	rig.Need(t, "fio")
	f.Nodes[0].Dog("vdi", "create", volume, fmt.Sprint(fioBytes))
	f.Know(volume)
	return &fioLoad{t: t, volume: volume}
}

// run runs fio once through a gateway.
func (l *fioLoad) run(s *rig.Sheep, more ...string) (r rig.Result, longest time.Duration) {
	args := append([]string{
		"--name=load", "--ioengine=nbd", "--uri=" + s.FromOutside(l.volume), "--rw=randwrite", "--bssplit=4k/70:16k/20:64k/10", fmt.Sprint("--size=", fioBytes),
		"--iodepth=8", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", fmt.Sprint("--randseed=", l.seed), "--output-format=json",
	}, more...)
	r = rig.Run(l.t, 5*time.Minute, "", "fio", args...)
	var report struct {
		Jobs []map[string]json.RawMessage `json:"jobs"`
	}
	_, text, _ := strings.Cut(r.Stdout, "\n{") // notes may come before it
	if json.Unmarshal([]byte("{"+text), &report) != nil && json.Unmarshal([]byte(r.Stdout), &report) != nil {
		return r, 0
	}
	for _, job := range report.Jobs {
		for _, what := range []string{"read", "write"} {
			var side struct {
				Latency struct{ Max float64 } `json:"lat_ns"`
			}
			if json.Unmarshal(job[what], &side) == nil {
				longest = max(longest, time.Duration(side.Latency.Max))
			}
		}
	}
	return r, longest
}

// good says whether fio has found all as it shall be.
func good(r rig.Result) bool { return r.Code == 0 && !strings.Contains(r.Stderr, "verify:") }

// start begins; end waits for the round that is under way.
func (l *fioLoad) start(s *rig.Sheep) {
	l.stop = make(chan struct{})
	l.wg.Go(func() {
		for {
			l.seed++
			// So slow that it lasts for some seconds, and leaves the machine to those under test.
			r, longest := l.run(s, "--do_verify=1", "--rate_iops=250")
			l.longest = max(l.longest, longest)
			if !good(r) {
				l.t.Errorf("fio through %s: status %d\n%s%s", s.Host(), r.Code, r.Stdout, r.Stderr)
				return
			}
			l.rounds++
			select {
			case <-l.stop:
				return
			default:
			}
		}
	})
}

func (l *fioLoad) end() {
	l.t.Helper()
	close(l.stop)
	l.wg.Wait()
	l.t.Logf("fio: %d times %d MiB written and verified, longest wait %v", l.rounds, fioBytes>>20, l.longest.Round(time.Millisecond))
	switch limit := stallLimit * patience(); {
	case l.longest == 0:
		l.t.Error("fio does not say how long its requests took")
	case l.longest > limit:
		l.t.Errorf("fio: a request took %v, at most %v is allowed", l.longest, limit)
	}
}

// verify reads what was written last through a gateway.
func (l *fioLoad) verify(s *rig.Sheep) {
	l.t.Helper()
	if r, _ := l.run(s, "--verify_only=1"); !good(r) {
		l.t.Errorf("fio verifies through %s: status %d\n%s%s", s.Host(), r.Code, r.Stdout, r.Stderr)
	}
}
