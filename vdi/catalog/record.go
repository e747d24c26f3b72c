package catalog

import (
	"cmp"
	"slices"
	"strings"
	"unicode/utf8"
)

// Limits of records.
const (
	MaxRecords    = 1 << 14
	MaxRecordKey  = 512      // bytes
	MaxRecordText = 64 << 10 // bytes
)

// Record is a text that somebody keeps under a key.
type Record struct {
	Key      string `json:"key"`
	Revision uint64 `json:"revision"`
	Text     string `json:"text"`
}

// setRecord refuses a change that does not know of the one before.
func (s *state) setRecord(c *SetRecord) error {
	if c.Key == "" || len(c.Key) > MaxRecordKey || strings.ContainsRune(c.Key, utf8.RuneError) {
		return refuse(ErrInvalid, "a key of %d bytes: must be UTF-8 of 1 to %d bytes", len(c.Key), MaxRecordKey)
	}
	if len(c.Text) > MaxRecordText {
		return refuse(ErrInvalid, "%q would take more than %d bytes", c.Key, MaxRecordText)
	}
	old, there := s.records[c.Key]
	switch {
	case old.Revision != c.Revision:
		return refuse(ErrStale, "%q was changed meanwhile", c.Key)
	case c.Text == "":
		if there {
			s.next() // it is a change like others: see Version
		}
		delete(s.records, c.Key)
		return nil
	case !there && len(s.records) >= MaxRecords:
		return refuse(ErrFull, "there are %d records already", MaxRecords)
	}
	s.records[c.Key] = Record{Key: c.Key, Revision: s.next(), Text: c.Text}
	return nil
}

func (s *state) recordsWith(prefix string) []Record {
	var list []Record
	for key, r := range s.records {
		if strings.HasPrefix(key, prefix) {
			list = append(list, r)
		}
	}
	slices.SortFunc(list, func(a, b Record) int { return cmp.Compare(a.Key, b.Key) })
	return list
}

// Record returns what is kept under a key; one without a text and with revision 0 if nothing is.
func (m *Machine) Record(key string) Record {
	m.mu.RLock()
	defer m.mu.RUnlock()
	r := m.state.records[key]
	r.Key = key
	return r
}

// Version grows with each record that is changed. Who has it has all records of before.
func (m *Machine) Version() uint64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.state.counter
}

// Records returns those whose keys begin with prefix, by key.
func (m *Machine) Records(prefix string) []Record {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.state.recordsWith(prefix)
}
