package api

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"
)

// Options say how a Client reaches a sheep. Zero values stand for the defaults.
type Options struct {
	Token   string        // to be shown with every call
	TLS     *tls.Config   // makes the client speak HTTPS
	Program string        // who calls, for the server's log; default "sheepdog-client"
	Timeout time.Duration // of calls that do not move content; default none
}

// Client calls the admin API of one sheep. Its methods may be called from any goroutine;
// their errors are *Error, with Kind telling what it is about.
type Client struct {
	base    string // scheme and host
	address string
	o       Options
	http    *http.Client
}

// Limits of connections and answers.
const (
	dialTimeout = 5 * time.Second
	// expectTimeout is how long an upload waits for the server to want it.
	expectTimeout = 2 * time.Second

	maxAnswer = 256 << 20 // bytes of JSON
	maxLine   = 16 << 20  // bytes of a line of events
)

// New makes a client for an address: HOST, HOST:PORT, or a URL with scheme http or https.
// It does not connect yet.
func New(address string, o Options) (*Client, error) {
	if o.Program == "" {
		o.Program = "sheepdog-client"
	}
	scheme, host := "http", address
	if s, rest, found := strings.Cut(address, "://"); found {
		scheme, host = s, strings.TrimSuffix(rest, "/")
	}
	switch {
	case scheme == "https" && o.TLS == nil:
		o.TLS = &tls.Config{}
	case scheme != "http" && scheme != "https", host == "", strings.ContainsAny(host, "/?#@ "):
		return nil, &Error{Kind: KindInvalid, Message: fmt.Sprintf("%q is not the address of a sheep", address), Hint: "give HOST, HOST:PORT or https://HOST:PORT"}
	}
	if o.TLS != nil {
		scheme = "https"
	}
	if _, _, err := net.SplitHostPort(host); err != nil {
		host = net.JoinHostPort(strings.Trim(host, "[]"), DefaultPort)
	}
	t := &http.Transport{
		DialContext:         (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSClientConfig:     o.TLS,
		TLSHandshakeTimeout: dialTimeout,
		DisableCompression:  true,
		WriteBufferSize:     256 << 10,
		ReadBufferSize:      256 << 10,

		ExpectContinueTimeout: expectTimeout,
	}
	return &Client{base: scheme + "://" + host, address: host, o: o, http: &http.Client{Transport: t, CheckRedirect: noRedirect}}, nil
}

func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// Address is HOST:PORT of the sheep.
func (c *Client) Address() string { return c.address }

// Close gives idle connections up.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// vdiPath makes the path of a VDI's call. Names that no path can have, no VDI has.
func vdiPath(name string, more ...string) (string, error) {
	path := "/vdis"
	for _, part := range append([]string{name}, more...) {
		if part == "" || part == "." || part == ".." {
			return "", &Error{Kind: KindInvalid, Message: fmt.Sprintf("%q is not a name", part)}
		}
		path += "/" + url.PathEscape(part)
	}
	return path, nil
}

// request is one call.
type request struct {
	method, path string
	query        url.Values
	kind         string // of the body
	body         io.Reader
	length       int64 // of the body; 0 with a body: not known
	trailers     bool
	upload       bool // the body may be long
}

func (c *Client) send(ctx context.Context, q request) (*http.Response, error) {
	target := c.base + Prefix + q.path
	if len(q.query) > 0 {
		target += "?" + q.query.Encode()
	}
	r, err := http.NewRequestWithContext(ctx, q.method, target, q.body)
	if err != nil {
		return nil, &Error{Kind: KindInvalid, Message: fmt.Sprintf("call the sheep at %s: %v", c.address, err)}
	}
	r.Header.Set(ClientHeader, c.o.Program)
	r.Header.Set("User-Agent", c.o.Program)
	if q.kind != "" {
		r.Header.Set("Content-Type", q.kind)
	}
	if q.length > 0 {
		r.ContentLength = q.length
	}
	if q.upload {
		r.Header.Set("Expect", "100-continue") // a call that is refused at once costs no content
	}
	if q.trailers {
		r.Header.Set("TE", "trailers")
	}
	if c.o.Token != "" {
		r.Header.Set("Authorization", "Bearer "+c.o.Token)
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return nil, unanswered(q.method, c.explain(ctx, err))
	}
	if resp.StatusCode/100 != 2 {
		defer resp.Body.Close()
		return nil, c.failure(resp)
	}
	return resp, nil
}

// failure reads the error of an answer.
func (c *Client) failure(resp *http.Response) error {
	b, _ := io.ReadAll(io.LimitReader(resp.Body, maxFrameError))
	e := new(Error)
	if err := json.Unmarshal(b, e); err == nil && e.Kind != "" {
		return e
	}
	return &Error{Kind: KindBroken, Message: fmt.Sprintf("what answers at %s is not a sheep's admin API: it said %s", c.address, resp.Status), Hint: "check the address"}
}

// explain says why there was no answer.
func (c *Client) explain(ctx context.Context, err error) error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e // of a body that was to be sent
	}
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err
	}
	const notRunning = "is the daemon running there? Give another address with -a HOST:PORT or in DOG_ADDRESS"
	switch op, isOp := errors.AsType[*net.OpError](err); {
	case ctx.Err() != nil && errors.Is(context.Cause(ctx), context.DeadlineExceeded):
		return &Error{Kind: KindUnreachable, Message: fmt.Sprintf("the sheep at %s did not answer in time", c.address), Hint: waitLonger}
	case ctx.Err() != nil:
		return &Error{Kind: KindInterrupted, Message: "interrupted"}
	case isOp && op.Op == "dial":
		return &Error{Kind: KindUnreachable, Message: fmt.Sprintf("cannot reach a sheep at %s: %v", c.address, op.Err), Hint: notRunning}
	case strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return &Error{Kind: KindUnreachable, Message: fmt.Sprintf("the sheep at %s does not speak TLS", c.address), Hint: "call it without --tls"}
	case isTLS(err):
		return &Error{Kind: KindUnreachable, Message: fmt.Sprintf("cannot trust the sheep at %s: %v", c.address, err), Hint: "give its certificate authority with --tls-ca FILE"}
	}
	return &Error{
		Kind: KindBroken, Message: fmt.Sprintf("the connection to the sheep at %s broke: %v", c.address, reason(err)),
		Hint: tryAgain,
	}
}

func isTLS(err error) bool {
	_, cert := errors.AsType[*tls.CertificateVerificationError](err)
	_, header := errors.AsType[tls.RecordHeaderError](err)
	_, alert := errors.AsType[tls.AlertError](err)
	return cert || header || alert
}

func reason(err error) error {
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed):
		return errors.New("it was closed")
	case errors.Is(err, syscall.ECONNRESET):
		return syscall.ECONNRESET
	case errors.Is(err, syscall.EPIPE):
		return syscall.EPIPE
	}
	return err
}

// call sends a JSON body (nil: none) and reads a JSON answer into v (nil: none).
func (c *Client) call(ctx context.Context, method, path string, query url.Values, body, v any) error {
	if c.o.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.o.Timeout)
		defer cancel()
	}
	q := request{method: method, path: path, query: query}
	if body != nil {
		if err := q.json(body); err != nil {
			return err
		}
	}
	resp, err := c.send(ctx, q)
	if err != nil {
		return err
	}
	return unanswered(method, c.answer(ctx, resp, v))
}

// unanswered adds to why there was no answer to a call that changes something what that means. No call is sent again by itself: the HTTP client
// repeats only what reads, or of which nothing was sent.
func unanswered(method string, err error) error {
	e, ok := errors.AsType[*Error](err)
	if !ok || method == http.MethodGet || method == http.MethodHead {
		return err
	}
	const look = `what was asked for may be done, or be done yet: look before trying again ("dog vdi list" shows VDIs and snapshots)`
	switch {
	case e.Hint == tryAgain, e.Kind == KindInterrupted:
		e.Hint = look
	case e.Hint == waitLonger:
		e.Hint = look + "; " + waitLonger
	}
	return e
}

// Hints of calls that change nothing.
const (
	waitLonger = "wait longer with --timeout"
	tryAgain   = "try again"
)

// json gives the request a body.
func (q *request) json(body any) error {
	b, err := json.Marshal(body)
	if err != nil {
		return &Error{Kind: KindInvalid, Message: fmt.Sprintf("encode the call: %v", err)}
	}
	q.kind, q.body, q.length = TypeJSON, bytes.NewReader(b), int64(len(b))
	return nil
}

// answer reads a JSON answer.
func (c *Client) answer(ctx context.Context, resp *http.Response, v any) error {
	defer resp.Body.Close()
	if v == nil {
		return nil
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return c.explain(ctx, err)
	case len(b) > maxAnswer:
		return &Error{Kind: KindBroken, Message: fmt.Sprintf("the answer of %s has more than %d bytes", c.address, maxAnswer)}
	}
	if err := json.Unmarshal(b, v); err != nil {
		return &Error{Kind: KindBroken, Message: fmt.Sprintf("what answers at %s is not a sheep's admin API: %v", c.address, err), Hint: "check the address"}
	}
	return nil
}

// lines calls fn for each line of an answer, until it returns false.
func (c *Client) lines(ctx context.Context, q request, fn func([]byte) (bool, error)) error {
	resp, err := c.send(ctx, q)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	in := bufio.NewScanner(resp.Body)
	in.Buffer(make([]byte, 64<<10), maxLine)
	for in.Scan() {
		if more, err := fn(in.Bytes()); err != nil || !more {
			return err
		}
	}
	if err := in.Err(); err != nil {
		return c.explain(ctx, err)
	}
	return nil
}

// badLine says that a line is not what was expected.
func (c *Client) badLine(err error) error {
	return &Error{Kind: KindBroken, Message: fmt.Sprintf("the answer of %s makes no sense: %v", c.address, err)}
}
