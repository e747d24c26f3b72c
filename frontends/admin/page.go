package admin

import (
	"embed"
	"io/fs"
	"net/http"
	"path"
	"slices"
	"strings"

	"sheepdog/frontends/admin/api"
)

// The page that shows the node. It is static; what it shows it asks of the API.
//
//go:embed ui
var ui embed.FS

// uiPrefix begins the paths of the page's parts.
const uiPrefix = "/ui/"

// page answers what the table does not have: the page, or that there is no such thing.
func (s *Server) page(mux *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := strings.TrimPrefix(r.URL.Path, "/")
		if name == "" {
			name = "ui/index.html"
		}
		body, err := fs.ReadFile(ui, name)
		if err == nil && isSafe(r.Method) {
			servePart(w, r, name, body)
			return
		}
		writeError(w, r, s.noRoute(w, r, mux))
	})
}

func servePart(w http.ResponseWriter, r *http.Request, name string, body []byte) {
	h := w.Header()
	h.Set("Content-Type", map[string]string{
		".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml",
	}[path.Ext(name)])
	h.Set("Cache-Control", "no-cache")
	h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	if r.Method != http.MethodHead {
		w.Write(body) // who cannot be told has gone
	}
}

// noRoute tells a wrong method from a wrong path.
func (s *Server) noRoute(w http.ResponseWriter, r *http.Request, mux *http.ServeMux) error {
	var allowed []string
	for _, m := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete} {
		probe := r.Clone(r.Context())
		probe.Method = m
		if _, pattern := mux.Handler(probe); pattern != "/" && pattern != "" {
			allowed = append(allowed, m)
		}
	}
	if len(allowed) > 0 && !slices.Contains(allowed, r.Method) {
		w.Header().Set("Allow", strings.Join(allowed, ", "))
		return refuse(api.KindMethod, "%.16s is not possible on %.300q, only %s", r.Method, r.URL.Path, strings.Join(allowed, ", "))
	}
	return refuse(api.KindNoRoute, "there is no %.300q", r.URL.Path)
}
