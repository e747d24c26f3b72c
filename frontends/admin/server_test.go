package admin_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"sheepdog/frontends/admin"
	"sheepdog/frontends/admin/admintest"
	"sheepdog/frontends/admin/api"
	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

func start(t *testing.T, change func(*admin.Config)) (*admintest.Sheep, *vdi.Service) {
	t.Helper()
	w := vditest.NewWorld(t)
	volumes := w.Start()
	return admintest.Start(t, volumes, change), volumes
}

// request is a call made by hand, as no good client would make it.
type request struct {
	method, path, body string
	header             map[string]string
	host               string
}

func do(t *testing.T, s *admintest.Sheep, r request) (int, api.Error, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	q, err := http.NewRequestWithContext(ctx, r.method, "http://"+s.Address+r.path, strings.NewReader(r.body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range r.header {
		q.Header.Set(k, v)
	}
	if r.host != "" {
		q.Host = r.host
	}
	res, err := http.DefaultClient.Do(q)
	if err != nil {
		t.Fatalf("%s %s: %v", r.method, r.path, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", r.method, r.path, err)
	}
	var e api.Error
	if res.StatusCode >= 400 {
		if err := json.Unmarshal(b, &e); err != nil {
			t.Errorf("%s %s: status %d without a JSON error: %q", r.method, r.path, res.StatusCode, b)
		}
	}
	return res.StatusCode, e, string(b)
}

var (
	asClient = map[string]string{api.ClientHeader: "test"}
	asJSON   = map[string]string{"Content-Type": api.TypeJSON}
)

// Whatever is wrong with a call has its status, its kind, and a message that names it.
func TestWrongCalls(t *testing.T) {
	s, _ := start(t, nil)
	if status, _, body := do(t, s, request{method: "POST", path: "/api/v1/vdis", header: asJSON, body: `{"name":"vm","size":1048576}`}); status != http.StatusCreated {
		t.Fatalf("create: %d %s", status, body)
	}
	for _, c := range []struct {
		name string
		request
		status int
		says   string
	}{
		{"unknown path", request{method: "GET", path: "/api/v1/nothing"}, 404, "nothing"},
		{"wrong method", request{method: "PATCH", path: "/api/v1/vdis", header: asClient}, 405, "PATCH"},
		{"unknown query", request{method: "GET", path: "/api/v1/vdis?colour=blue"}, 400, "colour"},
		{"query twice", request{method: "GET", path: "/api/v1/vdis?name=a&name=b"}, 400, "name"},
		{"no JSON", request{method: "POST", path: "/api/v1/vdis", header: asJSON, body: "{"}, 400, "JSON"},
		{"two values", request{method: "POST", path: "/api/v1/vdis", header: asJSON, body: `{"name":"a","size":1}{}`}, 400, ""},
		{"unknown field", request{method: "POST", path: "/api/v1/vdis", header: asJSON, body: `{"name":"a","size":1,"sise":2}`}, 400, "sise"},
		{"wrong type", request{method: "POST", path: "/api/v1/vdis", header: asJSON, body: `{"name":"a","size":"big"}`}, 400, "size"},
		{"negative size", request{method: "POST", path: "/api/v1/vdis", header: asJSON, body: `{"name":"a","size":-1}`}, 400, ""},
		{"no name", request{method: "POST", path: "/api/v1/vdis", header: asJSON, body: `{"size":1}`}, 400, "name"},
		{"huge body", request{method: "POST", path: "/api/v1/vdis", header: asJSON, body: `{"name":"` + strings.Repeat("x", 16<<20) + `"}`}, 400, "1048576"},
		{"there already", request{method: "POST", path: "/api/v1/vdis", header: asJSON, body: `{"name":"vm","size":1}`}, 409, "vm"},
		{"no such volume", request{method: "GET", path: "/api/v1/vdis/ghost"}, 404, "ghost"},
		{"no such snapshot", request{method: "GET", path: "/api/v1/vdis/vm?snapshot=s"}, 404, "s"},
		{"read past the end", request{method: "GET", path: "/api/v1/vdis/vm/data?offset=1048577"}, 400, ""},
		{"read what is no number", request{method: "GET", path: "/api/v1/vdis/vm/data?offset=-1"}, 400, "offset"},
		{"read more than all numbers", request{method: "GET", path: "/api/v1/vdis/vm/data?offset=1&length=9223372036854775807"}, 400, ""},
		{"write past the end", request{method: "PUT", path: "/api/v1/vdis/vm/data?offset=1048570", header: map[string]string{"Content-Type": api.TypeBytes}, body: "0123456789"}, 400, ""},
		{"import of something else", request{method: "PUT", path: "/api/v1/vdis/new/extents?create=true", header: map[string]string{"Content-Type": api.TypeExtents}, body: "QFI\xfb is no stream of extents"}, 400, ""},
		{"restore of something else", request{method: "PUT", path: "/api/v1/vdis/new/restore", header: map[string]string{"Content-Type": api.TypeBytes}, body: "what is this"}, 400, ""},
		{"a form of a web page", request{method: "POST", path: "/api/v1/cluster/shutdown", header: map[string]string{"Content-Type": "application/x-www-form-urlencoded"}, body: "a=b"}, 403, api.ClientHeader},
		{"another origin", request{method: "POST", path: "/api/v1/cluster/shutdown", header: map[string]string{api.ClientHeader: "x", "Sec-Fetch-Site": "cross-site", "Origin": "http://evil.example"}}, 403, "origin"},
		{"a name of somebody else's", request{method: "GET", path: "/api/v1/vdis", host: "evil.example"}, 403, "evil.example"},
		{"log level", request{method: "PUT", path: "/api/v1/log", header: asJSON, body: `{"level":"loud"}`}, 400, "loud"},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, e, body := do(t, s, c.request)
			if status != c.status || e.Kind == "" || e.Message == "" || !strings.Contains(body, c.says) {
				t.Errorf("status %d, want %d; it says %.300q, want %q", status, c.status, body, c.says)
			}
		})
	}
	if status, _, body := do(t, s, request{method: "GET", path: "/api/v1/vdis"}); status != 200 || strings.Count(body, `"name"`) != 1 {
		t.Errorf("what is there in the end: %d %s", status, body)
	}
	if s.Stopped {
		t.Error("the daemon was stopped")
	}
}

// Beside the token nothing opens the API; what is for everybody needs none.
func TestToken(t *testing.T) {
	s, _ := start(t, func(c *admin.Config) { c.Token = "0123456789abcdef" })
	for _, c := range []struct {
		path, authorization string
		status              int
	}{
		{"/api/v1/vdis", "", 401},
		{"/api/v1/vdis", "Bearer 0123456789abcdeg", 401},
		{"/api/v1/vdis", "Bearer ", 401},
		{"/api/v1/vdis", "Basic 0123456789abcdef", 401},
		{"/metrics", "", 401},
		{"/debug/pprof/heap", "", 401},
		{"/api/v1/vdis", "Bearer 0123456789abcdef", 200},
		{"/metrics", "Bearer 0123456789abcdef", 200},
		{"/healthz", "", 200},
		{"/", "", 200},
	} {
		h := map[string]string{}
		if c.authorization != "" {
			h["Authorization"] = c.authorization
		}
		status, _, body := do2(t, s, request{method: "GET", path: c.path, header: h})
		if status != c.status {
			t.Errorf("%s with %q: status %d, want %d: %.200s", c.path, c.authorization, status, c.status, body)
		}
		if strings.Contains(body, "0123456789abcdef") {
			t.Errorf("%s shows the token", c.path)
		}
	}
}

// do2 is do for answers that are not JSON.
func do2(t *testing.T, s *admintest.Sheep, r request) (int, http.Header, string) {
	t.Helper()
	q, err := http.NewRequest(r.method, "http://"+s.Address+r.path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range r.header {
		q.Header.Set(k, v)
	}
	res, err := http.DefaultClient.Do(q)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body)
	return res.StatusCode, res.Header, string(b)
}

// Every call that the description has is answered, and what is answered is described.
func TestDescription(t *testing.T) {
	s, _ := start(t, nil)
	_, _, body := do(t, s, request{method: "GET", path: "/api/v1/openapi.json"})
	var d struct {
		OpenAPI string
		Paths   map[string]map[string]struct {
			Summary   string
			Responses map[string]any
		}
	}
	if err := json.Unmarshal([]byte(body), &d); err != nil || d.OpenAPI == "" || len(d.Paths) < 20 {
		t.Fatalf("%v: %.300s", err, body)
	}
	for path, methods := range d.Paths {
		for method, c := range methods {
			if c.Summary == "" || len(c.Responses) == 0 {
				t.Errorf("%s %s is not described", method, path)
			}
			if method != "get" || strings.Contains(path, "pprof") {
				continue
			}
			real := strings.NewReplacer("{name}", "ghost", "{key}", "k").Replace(path)
			if status, _, body := do2(t, s, request{method: "GET", path: real}); status == 405 || status >= 500 {
				t.Errorf("GET %s: status %d: %.200s", real, status, body)
			}
		}
	}
}

// An import whose client dies leaves no volume behind; one that ends well is all there.
func TestImportIsAllOrNothing(t *testing.T) {
	s, volumes := start(t, nil)
	data := make([]byte, 9<<20+4321)
	rnd := rand.NewChaCha8([32]byte{1})
	rnd.Read(data)
	head := func(length int) string {
		return fmt.Sprintf("PUT /api/v1/vdis/vm/extents?create=true HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n", api.TypeExtents, length)
	}
	var stream bytes.Buffer
	w, err := api.NewExtentWriter(&stream, int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Data(0, data), w.Close(int64(len(data)))); err != nil {
		t.Fatal(err)
	}
	for _, part := range []int{1, 100, 1 << 20, stream.Len() - 1} {
		c, err := net.Dial("tcp", s.Address)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, head(stream.Len()))
		c.Write(stream.Bytes()[:part])
		c.Close()
	}
	deadline := time.Now().Add(2 * time.Minute)
	for {
		list, err := volumes.List(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if len(list) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("an import that was cut short left %+v", list)
		}
		time.Sleep(5 * time.Millisecond)
	}
	if status, _, body := do(t, s, request{method: "PUT", path: "/api/v1/vdis/vm/extents?create=true", header: map[string]string{"Content-Type": api.TypeExtents}, body: stream.String()}); status != 200 {
		t.Fatalf("import: %d %s", status, body)
	}
	_, _, got := do(t, s, request{method: "GET", path: "/api/v1/vdis/vm/data"})
	if sha256.Sum256([]byte(got)) != sha256.Sum256(data) {
		t.Errorf("read back %d bytes, which are others than the %d imported", len(got), len(data))
	}
}

// Garbage on the connection, and connections that say nothing, disturb nobody.
func TestGarbage(t *testing.T) {
	s, _ := start(t, nil)
	rnd := rand.New(rand.NewPCG(1, 1))
	for range 50 {
		c, err := net.Dial("tcp", s.Address)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, rnd.IntN(5000))
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		c.Write(b)
		if rnd.IntN(2) == 0 {
			c.Close()
		} else {
			defer c.Close()
		}
	}
	if status, _, body := do2(t, s, request{method: "GET", path: "/healthz"}); status != 200 {
		t.Errorf("healthz: %d %s", status, body)
	}
	c, err := net.Dial("tcp", s.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "GET /api/v1/vdis HTTP/1.1\r\nHost: localhost\r\nX: %s\r\n\r\n", strings.Repeat("x", 4<<20))
	c.SetReadDeadline(time.Now().Add(2 * time.Minute))
	if b, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) || strings.HasPrefix(string(b), "HTTP/1.1 200") {
		t.Errorf("a header of 4 MiB: %v %.100q", err, b)
	}
}

// A call about another node is answered by that, with its status and its errors; what cannot
// be asked of others is refused.
func TestForwarded(t *testing.T) {
	s, volumes := start(t, nil)
	s.Join(t, volumes)
	for _, c := range []struct {
		name string
		request
		status int
		says   string
	}{
		{"itself", request{method: "GET", path: "/api/v1/node?node=n1"}, 200, `"name":"n1"`},
		{"another", request{method: "GET", path: "/api/v1/node?node=n2"}, 200, `"name":"n2"`},
		{"another by number", request{method: "GET", path: "/api/v1/node/disks?node=2"}, 200, `"d2"`},
		{"one that does not answer", request{method: "GET", path: "/api/v1/node?node=g4"}, 503, "g4"},
		{"nobody", request{method: "GET", path: "/api/v1/node?node=n9"}, 404, "n9"},
		{"another's error", request{method: "PUT", path: "/api/v1/log?node=n2", header: asJSON, body: `{"level":"loud"}`}, 400, "loud"},
		{"another's body", request{method: "PUT", path: "/api/v1/log?node=n2", header: asJSON, body: `{"level":"debug"}`}, 200, "debug"},
		{"another's query", request{method: "GET", path: "/api/v1/sessions?node=n2&colour=blue"}, 400, "colour"},
		{"what is the same everywhere", request{method: "GET", path: "/api/v1/vdis?node=n2"}, 400, "node"},
		{"a huge body", request{method: "PUT", path: "/api/v1/log?node=n2", header: asJSON, body: strings.Repeat(" ", 16<<20)}, 400, "body"},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, _, body := do(t, s, c.request)
			if status != c.status || !strings.Contains(body, c.says) {
				t.Errorf("status %d, want %d; it says %.300q, want %q", status, c.status, body, c.says)
			}
		})
	}
	if s.Flock.Other.Level.Level().String() != "DEBUG" || s.Level.Level().String() != "INFO" {
		t.Errorf("levels are %v here and %v there", s.Level.Level(), s.Flock.Other.Level.Level())
	}
}

// Bytes from other nodes are answered with an error, or with what was asked for.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`{"method":"GET","path":"/api/v1/node","query":""}`))
	f.Add([]byte(`{"method":"PUT","path":"/api/v1/log","body":"e30="}`))
	f.Add([]byte(`{"method":"GET","path":"/api/v1/sessions","query":"all=%zz"}`))
	f.Add([]byte(`{`))
	server, err := admintest.Lone()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		answer := server.Answer(t.Context(), "n2", b)
		if len(answer) < 3 || !json.Valid(answer[2:]) {
			t.Fatalf("%q is answered with %q", b, answer)
		}
	})
}
