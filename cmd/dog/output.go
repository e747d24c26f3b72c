package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// column is one column of tables (head and cell), of raw rows (raw and value), or of both.
type column[T any] struct {
	head  string
	right bool
	cell  func(T) string
	raw   string
	value func(T) any
}

// grid is how a list of things is shown.
type grid[T any] []column[T]

// rawHelp is what help says of raw rows.
func (g grid[T]) rawHelp() string {
	var names []string
	for _, c := range g {
		if c.raw != "" {
			names = append(names, c.raw)
		}
	}
	return "Columns with -r: " + strings.Join(names, ", ") + "."
}

// rawRow makes a row for scripts: columns separated by one space. Space, backslash and
// what is not printable are escaped by a backslash in texts; an empty text is "-".
func (g grid[T]) rawRow(v T) string {
	var cells []string
	for _, c := range g {
		if c.raw != "" {
			cells = append(cells, rawCell(c.value(v)))
		}
	}
	return strings.Join(cells, " ")
}

func rawCell(v any) string {
	switch v := v.(type) {
	case string:
		return rawText(v)
	case time.Time:
		if v.IsZero() {
			return "-"
		}
		return strconv.FormatInt(v.Unix(), 10)
	case *time.Time:
		if v == nil {
			return "-"
		}
		return rawCell(*v)
	case bool:
		if v {
			return "1"
		}
		return "0"
	}
	return fmt.Sprint(v)
}

func rawText(s string) string {
	switch s {
	case "":
		return "-"
	case "-":
		return `\-`
	}
	var b strings.Builder
	for _, r := range s {
		switch {
		case r == '\n':
			b.WriteString(`\n`)
		case r == ' ' || r == '\\' || r == '\t':
			b.WriteByte('\\')
			b.WriteRune(r)
		case !unicode.IsPrint(r):
			fmt.Fprintf(&b, `\u{%x}`, r)
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// showList shows a list in the format that was asked for.
func showList[T any](a *app, g grid[T], list []T) error {
	if list == nil {
		list = []T{}
	}
	switch a.output {
	case formatTable:
		return a.write(g.table(list))
	case formatRaw:
		var b strings.Builder
		for _, v := range list {
			b.WriteString(g.rawRow(v) + "\n")
		}
		return a.write(b.String())
	}
	return a.encode(list)
}

// showOne shows one thing: in a table format as lines of facts.
func showOne[T any](a *app, g grid[T], v T, facts facts) error {
	switch a.output {
	case formatTable:
		return a.write(facts.String())
	case formatRaw:
		return a.write(g.rawRow(v) + "\n")
	}
	return a.encode(v)
}

// done tells that something was done: a line for people, the thing itself for programs.
func done[T any](a *app, g grid[T], v T, format string, args ...any) error {
	switch a.output {
	case formatTable:
		return a.write(printable(fmt.Sprintf(format, args...)) + "\n")
	case formatRaw:
		return a.write(g.rawRow(v) + "\n")
	}
	return a.encode(v)
}

// say tells people that something was done of which there is nothing to show.
func (a *app) say(format string, args ...any) error {
	if a.output != formatTable {
		return nil
	}
	return a.write(printable(fmt.Sprintf(format, args...)) + "\n")
}

func (a *app) write(s string) error {
	_, err := a.out.Write([]byte(s))
	if err != nil {
		return fmt.Errorf("write the output: %w", err)
	}
	return nil
}

// encode writes JSON or YAML.
func (a *app) encode(v any) error {
	b, err := encodeJSON(v)
	if err == nil && a.output == formatYAML {
		b, err = toYAML(b)
	}
	if err != nil {
		return fmt.Errorf("encode the output: %w", err)
	}
	return a.write(string(b))
}

func encodeJSON(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	err := e.Encode(v)
	return b.Bytes(), err
}

// toYAML turns JSON into YAML with the same names, order and numbers.
func toYAML(b []byte) ([]byte, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil { // JSON is YAML
		return nil, err
	}
	plain(&doc)
	var out bytes.Buffer
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	if err := e.Encode(&doc); err != nil {
		return nil, err
	}
	return out.Bytes(), e.Close()
}

// plain undoes the style of JSON, but for what is empty.
func plain(n *yaml.Node) {
	if n.Kind == yaml.ScalarNode || len(n.Content) > 0 {
		n.Style = 0
	}
	for _, c := range n.Content {
		plain(c)
	}
}

// table lays a list out for people.
func (g grid[T]) table(list []T) string {
	var rows [][]string
	var head []string
	var right []bool
	for _, c := range g {
		if c.cell != nil {
			head = append(head, c.head)
			right = append(right, c.right)
		}
	}
	rows = append(rows, head)
	for _, v := range list {
		var row []string
		for _, c := range g {
			if c.cell != nil {
				row = append(row, printable(c.cell(v)))
			}
		}
		rows = append(rows, row)
	}
	return layOut(rows, right)
}

func layOut(rows [][]string, right []bool) string {
	width := make([]int, len(right))
	for _, row := range rows {
		for i, cell := range row {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	var b strings.Builder
	for _, row := range rows {
		var line strings.Builder
		for i, cell := range row {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell))
			if right[i] {
				line.WriteString(pad + cell + "  ")
			} else {
				line.WriteString(cell + pad + "  ")
			}
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	return b.String()
}

// facts are lines "name: value".
type facts [][2]string

func (f *facts) add(name, value string) {
	if value != "" {
		*f = append(*f, [2]string{name, printable(value)})
	}
}

// String lays the facts out.
func (f facts) String() string {
	rows := make([][]string, len(f))
	for i, x := range f {
		rows[i] = []string{x[0] + ":", x[1]}
	}
	return layOut(rows, []bool{false, false})
}

// stream shows a list that comes bit by bit, and may be too long to be held.
type stream[T any] struct {
	a     *app
	g     grid[T]
	count int
	rows  []T // of the table, until it is laid out
}

func newStream[T any](a *app, g grid[T]) *stream[T] { return &stream[T]{a: a, g: g} }

// tableRows is how many rows of a table are laid out together.
const tableRows = 1000

func (s *stream[T]) add(v T) error {
	s.count++
	switch s.a.output {
	case formatRaw:
		return s.a.write(s.g.rawRow(v) + "\n")
	case formatTable:
		if s.rows = append(s.rows, v); len(s.rows) == tableRows {
			return s.flush()
		}
		return nil
	case formatYAML:
		b, err := encodeJSON([]T{v})
		if err == nil {
			b, err = toYAML(b)
		}
		if err != nil {
			return fmt.Errorf("encode the output: %w", err)
		}
		return s.a.write(string(b))
	}
	b, err := encodeJSON(v)
	if err != nil {
		return fmt.Errorf("encode the output: %w", err)
	}
	before := ",\n  "
	if s.count == 1 {
		before = "[\n  "
	}
	return s.a.write(before + strings.ReplaceAll(strings.TrimSuffix(string(b), "\n"), "\n", "\n  "))
}

func (s *stream[T]) flush() error {
	text := s.g.table(s.rows)
	if s.count > len(s.rows) { // it goes on: the heads were shown
		_, text, _ = strings.Cut(text, "\n")
	}
	s.rows = s.rows[:0]
	return s.a.write(text)
}

// end ends the list; a list that failed is not ended.
func (s *stream[T]) end(err error) error {
	if s.a.output == formatTable && (err == nil || s.count > 0) {
		if failed := s.flush(); err == nil {
			err = failed
		}
	}
	switch {
	case err != nil:
		return err
	case s.a.output == formatJSON && s.count == 0, s.a.output == formatYAML && s.count == 0:
		return s.a.write("[]\n")
	case s.a.output == formatJSON:
		return s.a.write("\n]\n")
	}
	return nil
}
