package consensus

// Bounds of what is remembered of answered commands. They are part of the replicated
// behaviour: all nodes must forget the same commands at the same entry.
const (
	windowEntries = 8192
	windowBytes   = 2 << 20
)

// window remembers the answers to the latest commands, oldest first.
type window struct {
	answers []answer
	byID    map[requestID]int // number of the answer, counted from the first ever
	first   int               // number of answers[0]
	bytes   int
	forgot  uint64 // index of the newest command that was forgotten
}

type answer struct {
	id     requestID
	index  uint64 // of its entry in the log
	result []byte
}

func newWindow() *window { return &window{byID: map[requestID]int{}} }

func (w *window) find(id requestID) ([]byte, bool) {
	n, ok := w.byID[id]
	if !ok {
		return nil, false
	}
	return w.answers[n-w.first].result, true
}

// covers reports whether the window knows all commands behind an index.
func (w *window) covers(since uint64) bool { return since >= w.forgot }

func (w *window) add(a answer) {
	w.byID[a.id] = w.first + len(w.answers)
	w.answers = append(w.answers, a)
	w.bytes += len(a.result)
	for len(w.answers) > windowEntries || w.bytes > windowBytes && len(w.answers) > 1 {
		oldest := w.answers[0]
		delete(w.byID, oldest.id)
		w.bytes -= len(oldest.result)
		w.forgot = oldest.index
		w.answers[0] = answer{}
		w.answers = w.answers[1:]
		w.first++
	}
}
