package admin

import (
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"strings"

	"sheepdog/frontends/admin/api"
)

// guard lets through who may call. On loopback, browsers are the danger: a web page from
// elsewhere must not reach the API with its visitor's hands. That needs three locks: the
// Host header must name the loopback (else a name of the attacker's could be made to point
// here, and his page would be of our origin), browsers that say that a call comes from
// another origin are believed, and calls that change something must have a header or a
// type of body that a page of another origin cannot send without asking first.
func (s *Server) guard(next http.Handler, local bool) http.Handler {
	cross := http.NewCrossOriginProtection()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := s.admit(r, local, cross); err != nil {
			s.metrics.refused.Inc()
			writeError(w, r, err)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (s *Server) admit(r *http.Request, local bool, cross *http.CrossOriginProtection) error {
	if local && !localName(r.Host) {
		return refuse(api.KindForbidden, "the Host header says %.64q, which is not this machine's loopback", r.Host).
			withHint("call it by 127.0.0.1 or localhost")
	}
	if err := cross.Check(r); err != nil {
		return refuse(api.KindForbidden, "the call comes from a web page of another origin")
	}
	if !isPublic(r) && !s.authorized(r) {
		return refuse(api.KindUnauthorized, "the token is missing or wrong")
	}
	if !isSafe(r.Method) && !deliberate(r) {
		return refuse(api.KindForbidden, "a call that changes something must say %q, or have a body of type %s, %s or %s",
			api.ClientHeader, api.TypeJSON, api.TypeBytes, api.TypeExtents).withHint("add the header " + api.ClientHeader + ": NAME")
	}
	return nil
}

// localName reports whether a Host header can only mean this machine.
func localName(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if strings.EqualFold(host, "localhost") {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.IsLoopback()
}

// isPublic tells what is shown to everybody: that the node is up, and the page, which has
// nothing in it before it has the token.
func isPublic(r *http.Request) bool {
	switch r.URL.Path {
	case "/healthz", "/readyz", "/":
		return isSafe(r.Method)
	}
	return isSafe(r.Method) && strings.HasPrefix(r.URL.Path, uiPrefix)
}

func isSafe(method string) bool {
	return method == http.MethodGet || method == http.MethodHead || method == http.MethodOptions
}

func (s *Server) demandsCertificate() bool {
	return s.cfg.TLS != nil && s.cfg.TLS.ClientAuth == tls.RequireAndVerifyClientCert
}

func (s *Server) authorized(r *http.Request) bool {
	if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		return true
	}
	if s.cfg.Token == "" {
		return true // mayListen has seen to it that this is wanted
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	// Hashes are of equal length, so the time of comparing says nothing.
	want, got := sha256.Sum256([]byte(s.cfg.Token)), sha256.Sum256([]byte(strings.TrimSpace(token)))
	return subtle.ConstantTimeCompare(want[:], got[:]) == 1 && strings.EqualFold(scheme, "Bearer")
}

// deliberate reports whether a call has what a browser does not send for a foreign page.
func deliberate(r *http.Request) bool {
	if r.Header.Get(api.ClientHeader) != "" {
		return true
	}
	kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	return err == nil && (kind == api.TypeJSON || kind == api.TypeBytes || kind == api.TypeExtents)
}
